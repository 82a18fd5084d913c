// Who else has an image open: for messages.
#pragma once

#include <stddef.h>

// That is locked by who writes to an image, as image.c has it.
#define HOLDER_WRITE_BYTE 101

// "qemu-system-x86 (process 17)", of one process that has locked the file of fd, as far as we may see, and of
// who writes to it before others; "somebody" else.
void image_holder(int fd, char *text, size_t text_bytes);
