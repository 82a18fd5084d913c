// --metrics ADDR: the counters by HTTP, on the main ring (libmicrohttpd's own polling is not used).
#pragma once

#include "ring/ring.h"
#include "util/log.h"

struct device;
struct http;

// A listening socket on "HOST:PORT", ":PORT" or "unix:PATH", or a negative errno with err set.
int http_listen(const char *addr, struct err *err);

// Answers GET /metrics on the socket, which stays the caller's. Main thread. 0, or a negative errno with
// err set.
int http_start(struct http **http_out, int fd, struct ring *ring, struct device *dev, struct err *err);

// No more requests. Main thread.
void http_stop(struct http *http);

// When the ring is gone.
void http_destroy(struct http *http);
