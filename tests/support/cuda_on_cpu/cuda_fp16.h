// What takes the place of CUDA's own header where a kernel is compiled for the CPU.
#pragma once
typedef _Float16 __half;
