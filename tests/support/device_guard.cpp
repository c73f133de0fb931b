// A device guard for a kind of device (DEVICE, of c10::DeviceType) on a machine without one. Torch guards the device of a
// FakeTensor too: torch_npu's own guard asks the driver, and torch's CPU build has none for CUDA. To be loaded after
// torch_npu, whose guard it takes the place of.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::DEVICE>;

static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::DEVICE, new Guard);
