// A device guard for NPUs on a machine without one. Torch guards the device of a FakeTensor too, and torch_npu's own
// guard asks the driver. To be loaded after torch_npu, whose guard it takes the place of.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1>;

static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::PrivateUse1, new Guard);
