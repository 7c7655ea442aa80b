// FM_MULTIVERSION: one binary for several x86-64 levels; the loader picks the clone for the processor that runs it.
//
// It marks plain (non-template) functions; the functions that they call must be FM_INLINE to be compiled into each
// clone.
#pragma once

#include "inlining.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define FM_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FM_MULTIVERSION
#endif
