// What the pretended accelerator has: blocks of memory, a capacity, copies that are not finished yet.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/resize_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto kKind = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kKind, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// A copy that was asked for and whose bytes have not been moved yet.
struct Copy {
  int64_t number, stream;
  char* target;
  const char* source;
  size_t bytes;
  std::vector<char> kept;  // what the source held, for a copy to the host: device memory is reused in stream order
};

struct State {
  std::recursive_mutex lock;
  std::map<char*, size_t> blocks, pinned;
  int64_t used = 0, peak = 0, capacity = 0, allocations = 0, fails_at = 0, failures = 0;
  int64_t pinned_bytes = 0, pinned_peak = 0;
  std::map<std::string, int64_t> launches;
  std::list<Copy> copies;
  int64_t copied = 0, streams = 0;
  pybind11::object* listener = nullptr;
};

// Never destroyed: tensors may outlive the statics of this file.
State& state() {
  static State* it = new State;
  return *it;
}

using Lock = std::lock_guard<std::recursive_mutex>;
thread_local int64_t current_stream = 0;

void report(const char* kind, const std::string& name, int64_t bytes) {
  if (state().listener == nullptr) return;
  pybind11::gil_scoped_acquire gil;
  if (state().listener != nullptr) (*state().listener)(kind, name, bytes);
}

// ---- copies that do not block ---------------------------------------------------------------------------------------

template <typename Which>
void finish(Which which) {
  Lock lock(state().lock);
  for (auto copy = state().copies.begin(); copy != state().copies.end();) {
    if (!which(*copy)) {
      ++copy;
      continue;
    }
    std::memcpy(copy->target, copy->kept.empty() ? copy->source : copy->kept.data(), copy->bytes);
    copy = state().copies.erase(copy);
  }
}

void finish_stream(int64_t stream, int64_t last = INT64_MAX) {
  finish([=](const Copy& copy) { return copy.stream == stream && copy.number <= last; });
}

bool touches(const char* pointer, const char* start, size_t bytes) { return pointer >= start && pointer < start + bytes; }

// Until it is finished, the target holds a pattern that no number has.
void begin(char* target, const char* source, size_t bytes, bool to_host) {
  Lock lock(state().lock);
  Copy copy{++state().copied, current_stream, target, source, bytes, {}};
  if (to_host) copy.kept.assign(source, source + bytes);
  state().copies.push_back(std::move(copy));
  std::memset(target, 0xff, bytes);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }  // as CUDA's caching allocator does

void release(void* pointer) {
  if (pointer == nullptr) return;
  Lock lock(state().lock);
  auto block = state().blocks.find(static_cast<char*>(pointer));
  state().copies.remove_if([&](const Copy& copy) { return touches(copy.target, block->first, block->second); });
  state().used -= block->second;
  state().blocks.erase(block);
  std::free(pointer);
}

void release_pinned(void* pointer) {
  if (pointer == nullptr) return;
  Lock lock(state().lock);
  auto block = state().pinned.find(static_cast<char*>(pointer));
  // The driver keeps pinned memory until its copies are done.
  finish([&](const Copy& copy) {
    return touches(copy.target, block->first, block->second) || touches(copy.source, block->first, block->second);
  });
  state().pinned_bytes -= block->second;
  state().pinned.erase(block);
  std::free(pointer);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, kDevice};
    Lock lock(state().lock);
    State& now = state();
    const auto size = static_cast<int64_t>(rounded(bytes));
    const bool is_full = now.capacity && now.used + size > now.capacity;
    if (++now.allocations == now.fails_at || is_full) {
      now.failures++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU 0 has a total "
                       "capacity of ", now.capacity, " bytes of which ", now.capacity - now.used, " bytes is free.");
    }
    auto* pointer = static_cast<char*>(std::aligned_alloc(512, size));
    now.blocks[pointer] = size;
    now.used += size;
    now.peak = std::max(now.peak, now.used);
    return {pointer, pointer, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release_pinned, c10::kCPU};
    Lock lock(state().lock);
    auto* pointer = static_cast<char*>(std::aligned_alloc(512, rounded(bytes)));
    state().pinned[pointer] = rounded(bytes);
    state().pinned_bytes += rounded(bytes);
    state().pinned_peak = std::max(state().pinned_peak, state().pinned_bytes);
    return {pointer, pointer, &release_pinned, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

bool is_pinned_pointer(const void* data) {
  Lock lock(state().lock);
  auto block = state().pinned.upper_bound(static_cast<char*>(const_cast<void*>(data)));
  if (block == state().pinned.begin()) return false;
  --block;
  return touches(static_cast<const char*>(data), block->first, block->second);
}

// ---- the same memory, seen from either side -------------------------------------------------------------------------

bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kKind; }

at::Tensor of_storage(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) {
  if (!is_ours(tensor)) return tensor;
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  c10::Storage seen(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  return of_storage(std::move(seen), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
}

at::Tensor on_device(const at::Tensor& host) {
  at::Tensor made(at::detail::empty_strided_generic(host.sizes(), host.strides(), &device_memory, kKeys, host.scalar_type()));
  if (host.numel()) on_host(made).copy_(host);
  return made;
}

}  // namespace
