// What is told to people: one line each, on stderr.
#pragma once

#include <stdbool.h>

extern bool log_is_verbose;

// "bight: <message>". Cold code only.
void log_line(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

// The same for what a client can make us say: not more than some lines in a while. Any thread.
void log_limited(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

// The same as log_line, only with --verbose.
void log_verbose(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

// The one line that a user's mistake gets: what, where, why, what to do instead. Filled where the
// mistake is seen, printed by whoever answers to the user.
struct err {
    char line[512];
    bool is_usage; // the command line is wrong, whatever the machine: exit status 2
};

// Writes the line and returns code, a negative errno: "return err_set(err, -EINVAL, ...)".
int err_set(struct err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// The same for a wrong command line. Returns -EINVAL.
int err_usage(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
