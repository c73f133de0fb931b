// The part of acl's C interface that csrc/ascend/host uses; host_on_cpu.cpp defines the functions.
#pragma once

#include <cstdint>

using aclError = int;
using aclrtStream = void *;
constexpr aclError ACL_SUCCESS = 0;

enum aclrtDevAttr { ACL_DEV_ATTR_CUBE_CORE_NUM, ACL_DEV_ATTR_VECTOR_CORE_NUM };
enum aclrtDevResLimitType { ACL_RT_DEV_RES_CUBE_CORE, ACL_RT_DEV_RES_VECTOR_CORE };
enum aclrtLastErrLevel { ACL_RT_THREAD_LEVEL };

const char *aclrtGetSocName();
aclError aclrtGetDevice(int32_t *device);
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t *value);
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value);
aclError aclrtGetLastError(aclrtLastErrLevel level);
