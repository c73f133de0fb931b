#include "require.h"

#include <stdexcept>

namespace qwen3_fp8_ascend::cpu {

void MessagePart::append_to(std::string& message) const {
  if (text_ != nullptr) {
    message += text_;
  } else {
    message += std::to_string(number_);
  }
}

void fail(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) part.append_to(message);
  throw std::runtime_error(message);
}

}  // namespace qwen3_fp8_ascend::cpu
