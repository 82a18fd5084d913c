// Unix sockets. Cold.
#pragma once

#include <stdint.h>

#include "util/log.h"

// A non-blocking listening socket at path, or a negative errno with err set. A stale one is replaced.
// what stands before the path in messages: "--nbd: unix:".
int unix_socket_listen(const char *what, const char *path, struct err *err);

// What a socket's send buffer holds; 0: it is no unix socket.
uint64_t unix_socket_sndbuf(int fd);

// Ends the listening, and removes the path if it still leads to fd. Before fd is closed. Other kinds of
// socket only end.
void unix_socket_unlisten(int fd);

// Removes the socket at path if nobody listens there.
void unix_socket_remove_stale(const char *path);
