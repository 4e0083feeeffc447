"""Faults of the loss over classes that are spread over processes."""

from __future__ import annotations

from . import Fault
from .portable import portable

SHARDS = "test_distributed_ops.py::test_shards_add_up"


def world(size: int, *checks: str) -> str:
    """Checks that processes make together; the one to catch the fault is to be the first."""
    test = "test_distributed.py::test_processes_together"
    return " ".join(f"{test}[{size}-{check}]" for check in checks)


def parallel(name: str, file: str, text: str, instead: str, *tests: str) -> Fault:
    return portable(f"shards: {name}", file, text, instead, *tests)


FAULTS = [
    parallel(
        "a process without the target adds its margin",
        "portable_shard.py",
        "(xp.where(here, value, 0.0) for value in margins)",
        "(value for value in margins)",
        SHARDS,
    ),
    parallel(
        "backward's chunks against a reference of 0",
        "portable_shard.py",
        "recomputed(back, linear_weight, reference, class_chunk, *needed)",
        "recomputed(back, linear_weight, 0 * reference, class_chunk, *needed)",
        SHARDS,
    ),
    parallel(
        "a target's share goes into every shard's gradient",
        "class_parallel.py",
        "            rows[1:4].masked_fill_(here < 0, 0.0)\n",
        "",
        world(2, "distributed_checks:options_of_the_loss"),
    ),
    parallel(
        "sums are added without a common reference",
        "class_parallel.py",
        "others = sums[1] * torch.exp(sums[0] - reference)",
        "others = sums[1]",
        world(2, "distributed_checks:options_of_the_loss"),
    ),
    parallel(
        "ignored rows have a target",
        "class_parallel.py",
        "        here &= kept\n",
        "        pass\n",
        world(2, "distributed_checks:ignored_rows"),
    ),
    parallel(
        "annealing goes by the cosines of ignored rows too",
        "class_parallel.py",
        "torch.where(claims > 0, measured[0], torch.inf) if measured",
        "measured[0] if measured",
        world(2, "distributed_checks:ignored_rows"),
        world(2, "distributed_layer_checks:counted_classes"),
    ),
    parallel(
        "annealing goes by the mean cosine, as if no row were harder",
        "distributed.py",
        "cosines = low_cosine(cosines, cosines != math.inf)",
        "cosines = cosines[cosines != math.inf].mean().float()",
        world(2, "distributed_checks:ignored_rows"),
        world(2, "distributed_training_checks:data_parallel"),
    ),
    parallel(
        "a row counts for its class as this process numbers it",
        "distributed.py",
        "count_classes(cosines.float(), targets.labels)",
        "count_classes(cosines.float(), targets.here.clamp(min=0))",
        world(2, "distributed_layer_checks:counted_classes"),
    ),
    parallel(
        "NaN of an ignored row goes everywhere",
        "class_parallel.py",
        "return torch.where(kept[start : start + input.shape[0]].unsqueeze(1), input, 0.0)",
        "return input",
        world(2, "distributed_checks:ignored_rows"),
    ),
    parallel(
        "dX is not multiplied for the average to come",
        "class_parallel.py",
        "mine[:n].mul_(options.input_factor)",
        "mine[:n]",
        world(2, "distributed_checks:options_of_the_loss"),
    ),
    parallel(
        "gradients a row are not exchanged",
        "class_parallel.py",
        "        dist.all_reduce(grad, group=options.group)\n",
        "",
        world(2, "distributed_checks:options_of_the_loss"),
    ),
    parallel(
        "the last classes are on no process",
        "class_shard.py",
        "size = -(-num_classes // mesh.size())",
        "size = num_classes // mesh.size()",
        world(2, "distributed_checks:initial_weights"),
    ),
    parallel(
        "every process begins with the same rows",
        "class_shard.py",
        "block[first - start : last - start]",
        "block[: last - first]",
        world(2, "distributed_checks:initial_weights"),
    ),
    parallel(
        "a whole W is loaded from its first rows",
        "class_shard.py",
        "rows = whole[self.classes.start : self.classes.stop]",
        "rows = whole[: len(self.classes)]",
        world(3, "distributed_state_checks:whole_state_dicts"),
    ),
    parallel(
        "a resumed run draws its first samples again",
        "sampling.py",
        "        self._drawn = int(self.draws)\n",
        "",
        world(3, "distributed_training_checks:sampled"),
    ),
    parallel(
        "the last class is drawn wherever a target is of another shard",
        "sampling.py",
        "keys.index_fill_(0, torch.where(target < 0, num_classes, target), 2.0)",
        "keys.index_fill_(0, torch.where(target < 0, num_classes - 1, target), 2.0)",
        "test_sampling.py::test_samples_are_fair",
    ),
    parallel(
        "clipping by the norm of the backbone alone",
        "clipping.py",
        "total = get_total_norm(norms, norm_type)",
        "total = get_total_norm(norms[:1], norm_type)",
        world(2, "distributed_training_checks:data_parallel"),
    ),
    parallel(
        "the largest gradient is that of this process's rows",
        "clipping.py",
        "        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)\n",
        "        pass\n",
        world(3, "distributed_training_checks:clipped_by_the_largest"),
    ),
    parallel(
        "a process that wants no gradient has no backward pass",
        "distributed.py",
        "if needs_grad and not (x.requires_grad or w.requires_grad):",
        "if False:",
        world(3, "distributed_traffic_checks:frozen_classes"),
    ),
    parallel(
        "rows of W are dealt out by a group and saved by a mesh of another order",
        "class_shard.py",
        "if order != ranks:",
        "if False:",
        world(2, "distributed_checks:mesh_backwards"),
    ),
    parallel(
        "rows that another process saved are taken",
        "class_shard.py",
        "if theirs != mine:",
        "if False:",
        world(2, "distributed_state_checks:rows_of_another"),
    ),
    parallel(
        "angles to class vectors of other processes are missing",
        "shard_stats.py",
        "    dist.all_reduce(own, group=group)\n",
        "",
        world(3, "distributed_layer_checks:stats"),
    ),
    parallel(
        "the largest other logit is that of this process's classes",
        "shard_stats.py",
        "    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)\n",
        "",
        world(3, "distributed_layer_checks:stats"),
    ),
    parallel(
        "padded rows count in the figures",
        "shard_stats.py",
        "x, here = x[kept], here[kept]",
        "pass",
        world(3, "distributed_layer_checks:stats"),
    ),
]
