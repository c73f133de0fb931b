// The current stream of the current device.
#pragma once

#include <acl/acl.h>

namespace c10_npu {

struct NPUStream {
    aclrtStream stream(bool need_empty) const;
};
NPUStream getCurrentNPUStream();

}  // namespace c10_npu
