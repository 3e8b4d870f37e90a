// What every kernel's text starts with, parsed once and kept precompiled.
#include "mlx/backend/metal/kernels/utils.h"
#ifdef MSL_RUN
#define EMU_THREADGROUP __attribute__((section("emu_threadgroup"), used, aligned(16)))
#define EMU_RED_ZONE(n) static EMU_THREADGROUP char emu_red_zone_##n[256];
#endif
