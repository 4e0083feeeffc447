// The ops' host side, as bindings.cpp registers it. Schemas and meanings: lsoftmax/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace lsoftmax {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_fwd(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    int64_t margin, const at::Tensor& lam, const std::optional<at::Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool save,
    int64_t class_chunk);

std::tuple<at::Tensor, at::Tensor> loss_bwd(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& linear_weight,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& e,
    const at::Tensor& rows, const at::Tensor& divisor, int64_t ignore_index, double label_smoothing,
    int64_t class_chunk, bool need_input, bool need_weight);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_and_gradients(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    int64_t margin, const at::Tensor& lam, const std::optional<at::Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, int64_t row_chunk,
    bool need_input, bool need_weight);

std::tuple<at::Tensor, at::Tensor, at::Tensor> shard_fwd(const at::Tensor& input,
                                                         const at::Tensor& linear_weight,
                                                         const at::Tensor& target, int64_t margin,
                                                         const at::Tensor& lam,
                                                         const std::optional<at::Tensor>& smoothing,
                                                         bool save, int64_t class_chunk);

std::tuple<at::Tensor, at::Tensor> shard_bwd(
    const at::Tensor& rows, const at::Tensor& input, const at::Tensor& linear_weight,
    const at::Tensor& target, const std::optional<at::Tensor>& smoothing, const at::Tensor& e,
    const at::Tensor& reference, int64_t class_chunk, bool need_input, bool need_weight);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_fwd(const at::Tensor& input,
                                                          const at::Tensor& linear_weight,
                                                          const at::Tensor& target, int64_t margin,
                                                          const at::Tensor& lam);

std::tuple<at::Tensor, at::Tensor> linear_bwd(const at::Tensor& grad, const at::Tensor& input,
                                              const at::Tensor& linear_weight,
                                              const at::Tensor& target,
                                              const at::Tensor& coefficients, bool need_input,
                                              bool need_weight);

at::Tensor upcoming_lam(const at::Tensor& steps, const at::Tensor& share, double base, double gamma,
                        double power, double minimum, double least_share);

void anneal_(const at::Tensor& steps, const at::Tensor& lam, const at::Tensor& share,
             const std::optional<at::Tensor>& next_lam, const std::optional<at::Tensor>& cosine,
             int64_t margin, double keep, double memory);

at::Tensor own_cosines(const at::Tensor& input, const at::Tensor& linear_weight,
                       const at::Tensor& target, int64_t ignore_index);

at::Tensor count_classes_(const at::Tensor& classes, const at::Tensor& cosines,
                          const at::Tensor& target, double memory);

}  // namespace lsoftmax
