// Memory that a thread keeps between calls, so that the hot path allocates nothing.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace qwen3_fp8_ascend::cpu {

class Scratch {
 public:
  // At least `bytes` bytes, aligned for any kernel; what was there before is lost when it has to grow.
  void* grow(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{4096};
  struct Release {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Release> memory_;
  std::size_t size_ = 0;
};

}  // namespace qwen3_fp8_ascend::cpu
