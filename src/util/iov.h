// Scatter lists.
#pragma once

#include <stddef.h>
#include <sys/uio.h>

// Copies len bytes between buf and the list, skip bytes into the list. The list is long enough.
void iov_from_buf(const struct iovec *iov, size_t skip, const void *buf, size_t len);
void iov_to_buf(const struct iovec *iov, size_t skip, void *buf, size_t len);
void iov_zero(const struct iovec *iov, size_t skip, size_t len);
