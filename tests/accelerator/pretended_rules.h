// What CUDA refuses when devices meet, and what it waits for.
#pragma once
#include "pretended_memory.h"

namespace {

// Besides pointwise operators, these take a number from the host where they are given a tensor without dimensions.
const std::set<std::string> kTakesNumbers = {
    "aten::fill_",        "aten::floor_divide", "aten::floor_divide_",     "aten::masked_fill", "aten::masked_fill_",
    "aten::index_put",    "aten::index_put_",   "aten::_index_put_impl_",  "aten::index_fill",  "aten::index_fill_"};

const std::set<std::string> kIndexes = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
                                        "aten::_unsafe_index", "aten::_unsafe_index_put"};

// Their results have a size that depends on values, or they check values.
const std::set<std::string> kWaits = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                      "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::histc",
                                      "aten::isin", "aten::_linalg_svd", "aten::multinomial"};

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

template <typename Use>
void each_tensor(const c10::IValue& value, Use use) {
  if (value.isTensor()) {
    use(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef())
      if (item.isTensor()) use(item.toTensor());
  }
}

void check(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> values) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  // Before it reads by a mask, torch asks for its positions.
  const bool waits_for_mask = name != "aten::index";
  const bool takes_numbers = op.hasTag(at::Tag::pointwise) || kTakesNumbers.count(name);
  bool has_ours = false, has_mask = false, has_size = false;
  std::string host;
  for (size_t i = 0; i < values.size(); i++) {
    const auto& argument = schema.arguments()[i];
    const bool is_index = kIndexes.count(name) && argument.name() == "indices";
    if (argument.name() == "output_size") has_size = !values[i].isNone();
    each_tensor(values[i], [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      if (is_ours(tensor)) {
        has_ours = true;
        has_mask |= is_index && waits_for_mask && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte);
      } else if (is_index) {
        report("up", name, static_cast<int64_t>(tensor.nbytes()));
      } else if (tensor.dim() > 0 || is_written(argument) || !takes_numbers) {
        host = argument.name();
      }
    });
  }
  TORCH_CHECK(!has_ours || host.empty(), "Expected all tensors to be on the same device, but found at least two devices, ",
              kDevice, " and cpu! (when checking argument for argument ", host, " in method ", name, ")");
  TORCH_CHECK(host.empty(), "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
  if (kWaits.count(name) || has_mask || (name == "aten::repeat_interleave" && !has_size)) report("wait", name, 0);
}

}  // namespace
