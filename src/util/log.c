#include "util/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

bool log_is_verbose;

static void log_v(const char *fmt, va_list ap)
{
    char line[640];

    // One write for the line: threads and processes that share stderr do not mix theirs.
    vsnprintf(line, sizeof(line), fmt, ap);
    fprintf(stderr, "bight: %s\n", line);
}

void log_line(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    log_v(fmt, ap);
    va_end(ap);
}

void log_verbose(const char *fmt, ...)
{
    va_list ap;

    if (!log_is_verbose)
        return;
    va_start(ap, fmt);
    log_v(fmt, ap);
    va_end(ap);
}

int err_set(struct err *err, int code, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(err->line, sizeof(err->line), fmt, ap);
    va_end(ap);
    return code;
}

int err_usage(struct err *err, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(err->line, sizeof(err->line), fmt, ap);
    va_end(ap);
    err->is_usage = true;
    return -EINVAL;
}
