// Text of a fixed size: messages are built without allocation.
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

namespace flash::host {

constexpr size_t kTextSize = 2048;

struct Text {
  char data[kTextSize];
  size_t length;

  void clear() {
    length = 0;
    data[0] = '\0';
  }

  // Appends as printf does; what does not fit is cut.
  void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add_list(format, arguments);
    va_end(arguments);
  }

  void add_list(const char* format, va_list arguments) {
    const size_t room = kTextSize - length;
    const int wanted = vsnprintf(data + length, room, format, arguments);
    if (wanted > 0)
      length += static_cast<size_t>(wanted) < room ? static_cast<size_t>(wanted) : room - 1;
  }
};

// The calling thread's last error.
Text& last_error();

// Sets the calling thread's last error; returns false, so that `return fail(...)` reads well.
bool fail(const char* format, ...);

}  // namespace flash::host
