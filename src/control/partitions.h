// Partitions of a block device: /dev/loop0p1. Cold.
//
//  N1. Kernels without parsers for partition tables find none by themselves, so that it is libblkid that
//  reads
//      the table; what the kernel has found already stays as it is.
#pragma once

#include "util/log.h"

// Makes the kernel's partitions those of the device's table. Those in use stay as they are. What serves the
// device must not be who waits for this (K1 of transport/fuse/loop.h). 0, or a negative errno with err set.
int partitions_update(const char *device, struct err *err);
