// What a CPU build of torch lacks before it accepts tensors whose device is "cuda": a device guard,
// hooks that report eight devices, and pinned memory. Nothing here computes. The library must be
// loaded before torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current_device_index = 0;  // a thread begins on device 0, as in CUDA

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const auto before = current_device_index;
  current_device_index = index;
  return before;
}

struct PretendGuard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {type(), exchange(device.index())};
  }
  c10::Device getDevice() const override { return {type(), current_device_index}; }
  void setDevice(c10::Device device) const override { current_device_index = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device_index = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendGuard)

// Pinned memory is ordinary memory whose ranges are known, so that Tensor.is_pinned() is right.
std::mutex pinned_mutex;
std::map<const char*, size_t>& pinned() {
  static auto* ranges = new std::map<const char*, size_t>();  // outlives all tensors
  return *ranges;
}

struct PinnedAllocator final : c10::Allocator {
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned().erase(static_cast<const char*>(memory));
    }
    std::free(memory);
  }
  c10::DataPtr allocate(size_t size) override {
    const size_t bytes = size ? size : 1;
    void* memory = std::malloc(bytes);
    TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " pinned bytes");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned()[static_cast<const char*>(memory)] = bytes;
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }
};

}  // namespace

namespace at {

struct PretendHooks final : CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return current_device_index; }
  DeviceIndex getCurrentDevice() const override { return current_device_index; }
  void setCurrentDevice(DeviceIndex index) const override { current_device_index = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    const auto* address = static_cast<const char*>(data);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto next = pinned().upper_bound(address);
    if (next == pinned().begin()) return false;
    --next;
    return address < next->first + next->second;
  }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks)

}  // namespace at

extern "C" {
int pretend_current_device() { return current_device_index; }
void pretend_set_device(int index) { current_device_index = static_cast<c10::DeviceIndex>(index); }
}
