// The kernel's loop device, put on a file: /dev/loopN.
//
//  K1. The kernel reads and writes the file while a loop device is put on it, resized and taken off. Who
//      serves the file must not be who waits for that: only cold threads and other processes call this.
//  K2. A device that somebody else has taken off may be a third one's by now. While it is open here, its
//      number cannot become that of another one: then its file is looked at.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/log.h"

#define LOOP_DEVICE_BYTES 32

struct loop_options {
    bool is_read_only;
    bool is_partscan;     // /dev/loopNpM
    bool is_buffered;     // false: direct I/O
    uint32_t block_bytes; // logical block of the device, 512 to 4096; 0: 512
};

// Puts a free loop device on the file. device: "/dev/loopN". 0, or a negative errno with err set.
int loop_attach(char device[LOOP_DEVICE_BYTES], const char *path, const struct loop_options *options,
                struct err *err);

// Takes it off, if it is on the file at the absolute path, or was before that was unmounted (K2). is_lazy: at
// its last close, when somebody has it open; else -EBUSY with err naming who does.
int loop_detach(const char *device, const char *path, bool is_lazy, struct err *err);

// The file has another size: the device as well. 0, or a negative errno with err set.
int loop_resize(const char *device, struct err *err);

// The file that the device is on, into path, and whether it is on any: 0, -ENXIO, or another negative
// errno.
int loop_backing_file(const char *device, char *path, size_t path_bytes);

// The devices that are on the file at the absolute path, at most max: how many.
unsigned loop_find(const char *path, char (*devices)[LOOP_DEVICE_BYTES], unsigned max);
