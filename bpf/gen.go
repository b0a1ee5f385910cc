// Package bpf holds metad's tc programs, compiled, and the Go types generated from their C.
package bpf

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v2 -I/usr/include/x86_64-linux-gnu" -go-package bpf -type task_value -type container_value -type tag -type verdict Metad metad.bpf.c
