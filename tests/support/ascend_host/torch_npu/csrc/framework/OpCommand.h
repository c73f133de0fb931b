// Runs a handler at once, where torch_npu queues it; like torch_npu, raises if the handler returns an error.
#pragma once

#include <c10/util/Exception.h>

#include <functional>
#include <string>
#include <utility>

namespace at_npu::native {

class OpCommand {
public:
    OpCommand &Name(const std::string &name) {
        name_ = name;
        return *this;
    }
    OpCommand &SetCustomHandler(std::function<int()> handler) {
        handler_ = std::move(handler);
        return *this;
    }
    void Run() {
        const int error = handler_();
        TORCH_CHECK(error == 0, "Custom hand fail! name=", name_, ", ret=", error);
    }

private:
    std::string name_;
    std::function<int()> handler_;
};

}  // namespace at_npu::native
