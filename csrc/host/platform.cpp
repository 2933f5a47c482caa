#include "host/platform.h"

#include <stdio.h>
#include <stdlib.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace flash::host {

#ifdef _WIN32

void* open_library(const char* path) {
  return LoadLibraryExA(path, nullptr, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
}

void* find_symbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

static FILE* open_file(const char* path) {
  wchar_t wide[1024];
  if (MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024) == 0) return nullptr;
  return _wfopen(wide, L"rb");
}

#else

void* open_library(const char* path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }

void* find_symbol(void* library, const char* name) { return dlsym(library, name); }

static FILE* open_file(const char* path) { return fopen(path, "rb"); }

// By their first version: a linker takes the newest, 2.34, which older systems do not have.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5\n.symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.17\n.symver dlsym, dlsym@GLIBC_2.17");
#endif

#endif

char* read_file(const char* path, size_t* size) {
  FILE* file = open_file(path);
  if (file == nullptr) return nullptr;
  size_t capacity = 1u << 16;
  size_t length = 0;
  char* data = static_cast<char*>(malloc(capacity));
  while (data != nullptr) {
    length += fread(data + length, 1, capacity - 1 - length, file);
    if (length < capacity - 1) break;
    capacity *= 2;
    char* larger = static_cast<char*>(realloc(data, capacity));
    if (larger == nullptr) free(data);
    data = larger;
  }
  const bool failed = ferror(file) != 0;
  fclose(file);
  if (data == nullptr) return nullptr;
  if (failed) {
    free(data);
    return nullptr;
  }
  data[length] = '\0';
  *size = length;
  return data;
}

}  // namespace flash::host
