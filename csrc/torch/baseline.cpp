// Two symbols that torch's headers use and that newer compilers take from newer libraries than
// manylinux_2_28 has: glibc 2.28 and the libstdc++ of GCC 8. Defined here, they ask nothing of a
// system.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// glibc 2.32 lets reference counts do without atomic operations in a process of one thread. Zero:
// they never do.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GCC 9 moved it into the library.
template std::basic_ostringstream<char>::basic_ostringstream();

#endif
