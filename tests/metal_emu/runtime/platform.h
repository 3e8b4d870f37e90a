// The few types and C library functions the runtime needs; declared here, so that no system headers are needed.
#pragma once

typedef __UINT16_TYPE__ u16;
typedef __UINT32_TYPE__ u32;
typedef __INT32_TYPE__ i32;
typedef __UINT64_TYPE__ u64;
typedef __INT64_TYPE__ i64;
typedef __UINTPTR_TYPE__ uptr;
typedef __SIZE_TYPE__ size_t;

extern "C" {
void* mmap(void*, size_t, int, int, int, long);
int munmap(void*, size_t);
int mprotect(void*, size_t, int);
void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);
void* calloc(size_t, size_t);
void free(void*);
int snprintf(char*, size_t, const char*, ...);
int raise(int);
[[noreturn]] void abort();

// The layouts of glibc and musl on x86-64 and aarch64.
struct SignalInfo {
  int number, error, code, pad;
  void* address;
};
struct SignalAction {
  void (*handler)(int, SignalInfo*, void*);
  unsigned long mask[16];
  int flags;
  void (*restorer)();
};
struct SignalStack {
  void* base;
  int flags;
  size_t size;
};
int sigaction(int, const SignalAction*, SignalAction*);
int sigaltstack(const SignalStack*, SignalStack*);
}

enum { PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, MAP_NORESERVE = 0x4000 };
enum { SIGBUS = 7, SIGFPE = 8, SIGSEGV = 11, SA_SIGINFO = 4, SA_ONSTACK = 0x08000000, SA_NODEFER = 0x40000000 };

// Zeroed memory of its own pages, taken from the system only where it is touched.
static char* map_pages(size_t bytes) {
  return (char*)mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
}

template <class T> struct Array {  // zeroed, freed at the end of its scope
  T* items;
  explicit Array(size_t count) : items((T*)calloc(count ? count : 1, sizeof(T))) {}
  ~Array() { free(items); }
  Array(const Array&) = delete;
  T& operator[](size_t i) { return items[i]; }
};
