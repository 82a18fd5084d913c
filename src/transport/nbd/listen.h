// Listening sockets from "unix:PATH" and "HOST:PORT".
#pragma once

#include "util/log.h"

// A non-blocking listening socket, or a negative errno with err set. A stale unix socket is replaced.
// option: what addr was given for, in messages: "--nbd".
int nbd_listen(const char *option, const char *addr, struct err *err);

// "nbd+unix:///?socket=PATH" or "nbd://HOST:PORT" of a listening socket, for people.
void nbd_listen_uri(int fd, char *uri, unsigned uri_bytes);
