// A pretended accelerator. Its tensors are in the memory of the process, but on a device of their own, and every
// operator refuses what CUDA would refuse. It counts what CUDA would launch, copy and wait for, has a capacity and a
// peak, and finishes a copy that does not block only when the program has waited for it.
#include "pretended_memory.h"
#include "pretended_rules.h"

namespace {

// ---- operators ------------------------------------------------------------------------------------------------------

struct Written {
  at::Tensor ours, host;
};

c10::IValue host_side(const c10::IValue& value, const c10::Argument& argument, std::vector<Written>& written) {
  auto one = [&](const at::Tensor& tensor) {
    if (!is_ours(tensor)) return tensor;
    // Only a tensor with memory of its own can grow, and an empty result does.
    const bool may_grow = is_written(argument) && tensor.numel() == 0;
    auto host = may_grow ? at::empty(tensor.sizes(), tensor.options().device(at::kCPU)) : on_host(tensor);
    if (is_written(argument)) written.push_back({tensor, host});
    return host;
  };
  if (value.isTensor()) return one(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(one(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::make_optional(one(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

// A result of the host is one of the arguments that were written, a view of an argument, or new.
at::Tensor device_side(const at::Tensor& host, const std::vector<Written>& written, const std::vector<at::Tensor>& given) {
  if (!host.defined()) return host;
  for (const Written& pair : written)
    if (pair.host.is_same(host)) return pair.ours;
  const auto* data = host.storage().data();
  for (const at::Tensor& tensor : given)
    if (data != nullptr && tensor.storage().data() == data) return of_storage(c10::Storage(tensor.storage()), kKeys, host);
  return on_device(host);
}

bool is_view(const c10::FunctionSchema& schema) {
  return !schema.returns().empty() && schema.returns()[0].alias_info() != nullptr && !schema.returns()[0].alias_info()->isWrite();
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = schema.arguments().size(), start = stack->size() - arguments;
  check(op, c10::ArrayRef<c10::IValue>(*stack).slice(start));
  if (!is_view(schema)) {
    Lock lock(state().lock);
    state().launches[schema.name()]++;
  }
  finish_stream(current_stream);
  std::vector<at::Tensor> given;
  std::vector<Written> written;
  for (size_t i = 0; i < arguments; i++) {
    auto& value = (*stack)[start + i];
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (is_ours(tensor)) given.push_back(tensor);
    });
    value = host_side(value, schema.arguments()[i], written);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const Written& pair : written) {
    if (pair.ours.sizes() == pair.host.sizes()) continue;
    at::native::resize_(pair.ours, pair.host.sizes(), std::nullopt);
    on_host(pair.ours).copy_(pair.host);
  }
  for (size_t i = start; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = device_side(value.toTensor(), written, given);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(device_side(tensor, written, given));
      value = list;
    }
  }
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, strides, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  const bool from = is_ours(source), to = is_ours(target);
  const auto bytes = static_cast<size_t>(target.numel()) * target.element_size();
  const bool is_plain = source.scalar_type() == target.scalar_type() && source.sizes() == target.sizes() &&
                        source.is_contiguous() && target.is_contiguous();
  const bool is_free = non_blocking && from != to && is_pinned_pointer((from ? target : source).storage().data());
  c10::DataPtr temporary;
  if (from && to) {
    Lock lock(state().lock);
    state().launches["aten::copy_"]++;
  } else if (bytes) {
    report(from ? (is_free ? "down-free" : "down") : (is_free ? "up-free" : "up"), c10::toString(target.scalar_type()), bytes);
    // CUDA moves one block of bytes: what has another layout or dtype is made ready next to it.
    if (!(from ? source : target).is_contiguous() || (from && !is_plain)) temporary = device_memory.allocate(bytes);
  }
  finish_stream(current_stream);
  if (is_free && is_plain && bytes)
    begin(static_cast<char*>(target.data_ptr()), static_cast<const char*>(source.data_ptr()), bytes, from);
  else if (bytes)
    on_host(target).copy_(on_host(source).expand_as(target));
  return target;
}

at::Tensor copy_and_resize(const at::Tensor& source, const at::Tensor& target) {
  at::native::resize_(target, source.sizes(), std::nullopt);
  return copy_from(source, target, false);
}

at::Scalar number(const at::Tensor& tensor) {
  report("item", "aten::_local_scalar_dense", static_cast<int64_t>(tensor.element_size()));
  finish_stream(current_stream);
  return on_host(tensor).item();
}

// The host's kernel takes no integers.
at::Tensor histc(const at::Tensor& tensor, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  report("wait", "aten::histc", 0);
  finish_stream(current_stream);
  return on_device(at::histc(on_host(tensor).to(at::kFloat), bins, low, high).to(tensor.scalar_type()));
}

// The host has no products with another result dtype.
at::Tensor mm_wide(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype) {
  return at::mm(left.to(dtype), right.to(dtype));
}

at::Tensor bmm_wide(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype) {
  return at::bmm(left.to(dtype), right.to(dtype));
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  TORCH_CHECK(is_ours(input) && is_ours(weight) && (!bias || !bias->defined() || is_ours(*bias)),
              "Expected all tensors to be on the same device (convolution)");
  finish_stream(current_stream);
  auto host_bias = bias && bias->defined() ? std::make_optional(on_host(*bias)) : std::nullopt;
  return on_device(at::convolution_symint(on_host(input), on_host(weight), host_bias, stride, padding, dilation, transposed,
                                          output_padding, std::move(groups)));
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_and_resize);
  library.impl("_local_scalar_dense", number);
  library.impl("histc", histc);
  library.impl("mm.dtype", mm_wide);
  library.impl("bmm.dtype", bmm_wide);
  library.impl("convolution_overrideable", convolution);
  library.impl("record_stream", record_stream);
  // Its composite kernel would read the end of every group.
  library.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&run>());
}

// ---- streams and events ---------------------------------------------------------------------------------------------

// What had been asked for on a stream when the event was recorded.
struct Event {
  int64_t stream, last;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  c10::DeviceType type() const override { return kKind; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(state().lock);
    return stream(++state().streams);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = stream(current_stream);
    current_stream = next.id();
    return before;
  }
  void record(void** event, const c10::Stream& on, c10::DeviceIndex, c10::EventFlag) const override {
    Lock lock(state().lock);
    destroyEvent(*event, 0);
    *event = new Event{on.id(), state().copied};
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void block(void* event, const c10::Stream&) const override { finish_event(event); }
  bool queryEvent(void* event) const override {
    finish_event(event);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    report("wait", "event", 0);
    finish_event(event);
  }
  bool queryStream(const c10::Stream& on) const override {
    finish_stream(on.id());
    return true;
  }
  void synchronizeStream(const c10::Stream& on) const override {
    report("wait", "stream", 0);
    finish_stream(on.id());
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    report("wait", "device", 0);
    finish([](const Copy&) { return true; });
  }
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0.0; }
  static void finish_event(void* event) {
    if (event != nullptr) finish_stream(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->last);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned_pointer(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
};

Hooks hooks;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kKind, &device_memory);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("listen", [](const pybind11::object& listener) {
    delete state().listener;
    state().listener = listener.is_none() ? nullptr : new pybind11::object(listener);
  });
  m.def("reset", [](bool counts) {
    Lock lock(state().lock);
    state().peak = state().used;
    if (!counts) return;
    state().launches.clear();
    state().allocations = state().failures = 0;
  });
  m.def("limit", [](int64_t bytes) { state().capacity = bytes; });
  m.def("fail_at", [](int64_t allocation) { state().fails_at = allocation; });
  m.def("launches", [] { return state().launches; });
  m.def("memory", [] {
    Lock lock(state().lock);
    const State& now = state();
    return std::map<std::string, int64_t>{{"used", now.used}, {"peak", now.peak}, {"capacity", now.capacity},
                                          {"allocations", now.allocations}, {"failures", now.failures},
                                          {"pinned", now.pinned_bytes}, {"pinned_peak", now.pinned_peak}};
  });
}
