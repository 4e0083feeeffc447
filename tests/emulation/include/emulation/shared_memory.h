// Shared memory that remembers: who wrote and read each element, and when.
//
// Two accesses of one element by different threads, one of them a write, must be ordered: by a
// block barrier, or by a __syncwarp that both threads took part in. That is decided from the
// recorded times and not from what happened to go wrong, so a race is found on any run that makes
// both accesses. Shuffles and votes order nothing: CUDA does not promise that they do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulation/fault.h"

namespace emulation {

struct Access {
  uint64_t time = 0;  // of the engine's clock; before this block began: as good as none
  Site site;
  uint16_t thread = 0;
};

class SharedMemory {
 public:
  SharedMemory(unsigned char* data, size_t bytes, size_t unit) : data_(data) {
    resize(bytes, unit);
  }

  void read(size_t offset, void* value, size_t size, Site site);
  void write(size_t offset, const void* value, size_t size, Site site);

  size_t bytes() const { return bytes_; }
  // unit: the bytes that one record stands for; 0: the next view decides.
  void resize(size_t bytes, size_t unit);
  // Makes records fine enough for elements of `size` bytes: dynamic memory may hold several types.
  void view_as(size_t size);

 private:
  struct Record {
    Access write;
    std::vector<Access> reads;  // since the last barrier; see note_read
  };
  void touch(Site site);
  void note_read(Record& record, const Access& access);

  unsigned char* data_;
  size_t bytes_ = 0, unit_ = 0;
  std::vector<Record> records_;
  uint64_t last_block_ = 0;
};

// An index, and where it was written: operator[] takes exactly one argument.
struct Index {
  ptrdiff_t value;
  Site site;
  template <typename I, typename = std::enable_if_t<std::is_convertible_v<I, ptrdiff_t>>>
  Index(I&& i, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : value(static_cast<ptrdiff_t>(std::forward<I>(i))), site{file, line} {}
};

// One element. Every member wants an rvalue: `auto v = array[i];` would read later than the kernel
// does, and does not compile when v is used.
template <typename T>
class Element {
 public:
  static_assert(std::is_trivially_copyable_v<T>, "shared memory holds plain data");

  Element(SharedMemory& memory, size_t offset, Site site)
      : memory_(memory), offset_(offset), site_(site) {}
  Element(const Element&) = delete;

  operator T() && { return get(); }
  void operator=(const T& value) && { memory_.write(offset_, &value, sizeof(T), site_); }
  void operator=(Element&& other) && { std::move(*this) = other.get(); }
  template <typename U>
  void operator+=(const U& u) && {
    std::move(*this) = static_cast<T>(get() + u);
  }
  template <typename U>
  void operator-=(const U& u) && {
    std::move(*this) = static_cast<T>(get() - u);
  }
  template <typename U>
  void operator*=(const U& u) && {
    std::move(*this) = static_cast<T>(get() * u);
  }

 private:
  T get() const {
    T value;
    memory_.read(offset_, &value, sizeof(T), site_);
    return value;
  }

  SharedMemory& memory_;
  size_t offset_;
  Site site_;
};

[[noreturn]] void fault_out_of_bounds(ptrdiff_t index, ptrdiff_t size, Site site);

// The engine's one block of dynamic shared memory, as large as the running launch asked for.
SharedMemory& dynamic_memory();

// What `extern __shared__` memory is to a kernel: a pointer, but one that knows its bounds.
template <typename T>
class SharedPointer {
 public:
  SharedPointer() = default;

  Element<T> operator[](Index i) const {
    SharedMemory& memory = dynamic_memory();
    const auto size = static_cast<ptrdiff_t>(memory.bytes() / sizeof(T));
    const ptrdiff_t at = first_ + i.value;
    if (at < 0 || at >= size) fault_out_of_bounds(at, size, i.site);
    return Element<T>(memory, at * sizeof(T), i.site);
  }
  Element<T> operator*() const { return (*this)[0]; }
  SharedPointer operator+(ptrdiff_t n) const { return SharedPointer(first_ + n); }
  SharedPointer operator-(ptrdiff_t n) const { return SharedPointer(first_ - n); }
  SharedPointer& operator+=(ptrdiff_t n) {
    first_ += n;
    return *this;
  }

 private:
  explicit SharedPointer(ptrdiff_t first) : first_(first) {}

  ptrdiff_t first_ = 0;  // in elements, from the start of the memory
};

}  // namespace emulation

template <typename T, int N>
struct SharedArray {
  SharedArray() : memory_(storage_, sizeof(T) * N, sizeof(T)) {}
  SharedArray(const SharedArray&) = delete;
  void operator=(const SharedArray&) = delete;

  emulation::Element<T> operator[](emulation::Index i) {
    if (i.value < 0 || i.value >= N) emulation::fault_out_of_bounds(i.value, N, i.site);
    return emulation::Element<T>(memory_, i.value * sizeof(T), i.site);
  }
  T operator[](emulation::Index i) const { return const_cast<SharedArray&>(*this)[i]; }

 private:
  alignas(16) unsigned char storage_[sizeof(T) * N];
  emulation::SharedMemory memory_;
};

template <typename T>
emulation::SharedPointer<T> dynamic_shared() {
  emulation::dynamic_memory().view_as(sizeof(T));
  return emulation::SharedPointer<T>();
}
