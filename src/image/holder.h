// Who else has an image open: for messages.
#pragma once

#include <stddef.h>

// "qemu-system-x86 (process 17)", of one process that has locked the file of fd, as far as we may see;
// "somebody" else.
void image_holder(int fd, char *text, size_t text_bytes);
