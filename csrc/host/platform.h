// What the operating system gives: a lock, a shared library opened at run time, a file's bytes.
//
// No C++ runtime stands behind this library, so neither std::mutex nor std::ifstream.
#pragma once

#include <stddef.h>

#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#else
#include <pthread.h>
#endif

namespace flash::host {

class Mutex {
 public:
#ifdef _WIN32
  void lock() { AcquireSRWLockExclusive(&handle_); }
  void unlock() { ReleaseSRWLockExclusive(&handle_); }

 private:
  SRWLOCK handle_ = SRWLOCK_INIT;
#else
  void lock() { pthread_mutex_lock(&handle_); }
  void unlock() { pthread_mutex_unlock(&handle_); }

 private:
  pthread_mutex_t handle_ = PTHREAD_MUTEX_INITIALIZER;
#endif
};

class Lock {
 public:
  explicit Lock(Mutex& mutex) : mutex_(mutex) { mutex_.lock(); }
  ~Lock() { mutex_.unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  Mutex& mutex_;
};

// A loaded library, or null; `path` is a name that the system's search finds.
void* open_library(const char* path);

// The address of an exported function, or null.
void* find_symbol(void* library, const char* name);

// A file's bytes with a zero behind them, from malloc, or null. `path` is UTF-8.
char* read_file(const char* path, size_t* size);

}  // namespace flash::host
