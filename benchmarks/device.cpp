// A device of torch's own kind ("PrivateUse1") that reckons on the CPU: what mixes tensors of two devices fails on it as on
// a GPU. Memory is the CPU's; every operator that is not below runs on aliases of its tensors that pass for the CPU's.

#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <cstring>
#include <set>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &release, kDevice};
  }
  static void release(void* data) {
    if (data) c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

// One device with one stream, on which everything is done when the call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool isPinnedPtr(const void*) const override { return false; }
};
Hooks hooks;
[[maybe_unused]] const bool hooked = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kDevice.type(); }

void* start(const Tensor& t) {
  auto* data = static_cast<char*>(t.storage().mutable_data());
  return data ? data + t.storage_offset() * t.element_size() : nullptr;
}

// The same memory as a tensor of the CPU's. What is empty may be resized, which memory of another's may not.
Tensor on_cpu(const Tensor& t) {
  const auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t.numel() == 0) return at::empty(t.sizes(), options);
  return at::from_blob(start(t), t.sizes(), t.strides(), [storage = t.storage()](void*) {}, options);
}

// The memory of a tensor of the CPU's, which is kept alive, as a tensor of ours.
Tensor from_cpu(const Tensor& t) {
  const auto bytes = t.numel() ? at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size()) : 0;
  c10::DataPtr data(start(t), new Tensor(t), [](void* held) { delete static_cast<Tensor*>(held); }, kDevice);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), &memory, true);
  auto ours = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), kKeys, t.dtype());
  ours.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return ours;
}

Tensor alias(const Tensor& t, IntArrayRef size, IntArrayRef stride, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return view;
}

// Every other operator. A tensor of the CPU's may come as a single number or as an index alone, as on a GPU.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> indexing = {"aten::index", "aten::index_put", "aten::index_put_",
                                                 "aten::_index_put_impl_", "aten::_unsafe_index"};
  const auto& schema = op.schema();
  const bool may_mix = indexing.count(schema.name()) > 0;
  std::vector<std::pair<Tensor, Tensor>> aliases;
  const auto given = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    if (!is_ours(t)) {
      TORCH_CHECK(t.dim() == 0 || may_mix, "Expected all tensors to be on the same device, but ", schema.name(),
                  " got one of the CPU of size ", t.sizes());
      return t;
    }
    for (const auto& [ours, theirs] : aliases)
      if (ours.is_same(t)) return theirs;
    aliases.emplace_back(t, on_cpu(t));
    return aliases.back().second;
  };
  for (auto it = stack->end() - schema.arguments().size(); it != stack->end(); ++it) {
    if (it->isTensor()) {
      *it = given(it->toTensor());
    } else if (it->isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : it->toTensorVector()) list.push_back(given(t));
      *it = list;
    } else if (it->isOptionalTensorList()) {
      c10::List<optional<Tensor>> list;
      for (const optional<Tensor>& t : it->toOptionalTensorList())
        list.push_back(t.has_value() ? optional<Tensor>(given(*t)) : t);
      *it = list;
    } else if (it->isDevice() && it->toDevice().type() == kDevice.type()) {
      *it = c10::Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [ours, theirs] : aliases) {
    if (ours.sizes() == theirs.sizes()) continue;
    auto* grown = ours.unsafeGetTensorImpl();  // an output that the operator made room for
    grown->set_storage_keep_dtype(from_cpu(theirs).storage());
    grown->set_storage_offset(0);
    grown->set_sizes_and_strides(theirs.sizes(), theirs.strides());
  }
  const auto returned = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    for (const auto& [ours, theirs] : aliases)
      if (theirs.is_same(t)) return ours;
    return from_cpu(t);
  };
  for (auto it = stack->end() - schema.returns().size(); it != stack->end(); ++it) {
    if (it->isTensor()) {
      *it = returned(it->toTensor());
    } else if (it->isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : it->toTensorVector()) list.push_back(returned(t));
      *it = list;
    }
  }
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  const auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, &memory, kKeys, type, format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  const auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type);
}

Tensor as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return alias(t, size, stride, offset.value_or(t.storage_offset()));
}

Tensor view(const Tensor& t, IntArrayRef size) {
  const auto inferred = at::infer_size_dv(size, t.numel());
  const auto stride = at::detail::computeStride(t.sizes(), t.strides(), inferred);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return alias(t, inferred, *stride, t.storage_offset());
}

Tensor reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  return alias(t, size, stride, t.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  (is_ours(to) ? on_cpu(to) : to).copy_(is_ours(from) ? on_cpu(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  return copy_from(from, to.resize_(from.sizes()), false);
}

c10::Scalar number(const Tensor& t) { return on_cpu(t).item(); }

const Tensor& resize(const Tensor& t, IntArrayRef size, optional<at::MemoryFormat>) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, t.element_size(), t.storage_offset());
  if (t.storage().nbytes() < bytes) {
    auto storage = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes), &memory, true);
    if (t.storage().nbytes()) std::memcpy(storage->mutable_data(), t.storage().data(), t.storage().nbytes());
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(c10::Storage(storage));
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

Tensor& set_strided(Tensor& t, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* implementation = t.unsafeGetTensorImpl();
  implementation->set_storage_keep_dtype(std::move(source));
  implementation->set_storage_offset(offset);
  if (stride.empty()) {
    implementation->set_sizes_contiguous(size);
  } else {
    implementation->set_sizes_and_strides(size, stride);
  }
  return t;
}

Tensor& set_whole(Tensor& t, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / t.element_size());
  return set_strided(t, std::move(source), 0, count, {});
}

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  const bool has_bias = bias.has_value() && bias->defined();
  TORCH_CHECK(is_ours(x) && is_ours(weight) && (!has_bias || is_ours(*bias)),
              "Expected all tensors to be on the same device, but a convolution got one of the CPU");
  at::AutoDispatchBelowAutograd below;
  return from_cpu(at::convolution(on_cpu(x), on_cpu(weight), has_bias ? optional<Tensor>(on_cpu(*bias)) : std::nullopt,
                                  stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  at::AutoDispatchBelowAutograd below;
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  const auto [grad_x, grad_weight, grad_bias] =
      at::convolution_backward(on_cpu(grad), on_cpu(x), on_cpu(weight), at::OptionalIntArrayRef(bias), stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  const auto returned = [](const Tensor& t) { return t.defined() ? from_cpu(t) : t; };
  return {returned(grad_x), returned(grad_weight), returned(grad_bias)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_strided);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace
