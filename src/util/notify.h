// What systemd and its like tell us and want to hear: sd_notify(3) and sd_listen_fds(3), without the
// library.
#pragma once

#include <sys/types.h>

// Sends state ("READY=1") to $NOTIFY_SOCKET, if there is one.
void notify_send(const char *state);

// The number of sockets that were passed to that process; what others left in the environment is nothing to
// it.
unsigned notify_nr_fds(pid_t pid);

// The number of sockets that were passed to this process, from NOTIFY_FIRST_FD on; the environment is
// cleared of them. 0: none.
#define NOTIFY_FIRST_FD 3
unsigned notify_listen_fds(void);
