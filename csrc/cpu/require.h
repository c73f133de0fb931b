// Preconditions of operators. What does not hold becomes a RuntimeError that says which and why.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace qwen3_fp8_ascend::cpu {

// Of a message: text, or a whole number.
class MessagePart {
 public:
  MessagePart(const char* text) : text_(text) {}
  MessagePart(const std::string& text) : text_(text.c_str()) {}
  MessagePart(std::int64_t number) : number_(number) {}

  void append_to(std::string& message) const;

 private:
  const char* text_ = nullptr;
  std::int64_t number_ = 0;
};

[[noreturn]] void fail(std::initializer_list<MessagePart> parts);

// A precondition of an operator; the parts of the message are put together only when it does not hold.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail({"qwen3_fp8_ascend: ", parts...});
}

}  // namespace qwen3_fp8_ascend::cpu
