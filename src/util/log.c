#include "util/log.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "util/util.h"

// log_limited()
#define LIMITED_LINES 20
#define LIMITED_NS (60 * NSEC_PER_SEC)

bool log_is_verbose;

// One line whatever names are in it. One that is too long loses its middle: the reason stands at the end.
static void format_line(char *line, size_t line_bytes, const char *fmt, va_list ap)
{
    static const char cut[] = "...";
    size_t head_bytes = line_bytes / 2, tail_bytes = line_bytes - head_bytes - strlen(cut), len;
    char text[8192];

    vsnprintf(text, sizeof(text), fmt, ap);
    len = strlen(text);
    for (size_t i = 0; i < len; i++) {
        if (iscntrl((unsigned char)text[i]))
            text[i] = '?';
    }
    if (len < line_bytes) {
        memcpy(line, text, len + 1);
        return;
    }
    memcpy(line, text, head_bytes);
    memcpy(line + head_bytes, cut, strlen(cut));
    memcpy(line + line_bytes - tail_bytes, text + len + 1 - tail_bytes, tail_bytes);
}

static void log_v(const char *fmt, va_list ap)
{
    char line[640];

    // One write for the line: threads and processes that share stderr do not mix theirs.
    format_line(line, sizeof(line), fmt, ap);
    fprintf(stderr, "bight: %s\n", line);
}

void log_line(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    log_v(fmt, ap);
    va_end(ap);
}

void log_limited(const char *fmt, ...)
{
    static atomic_uint_fast64_t since_ns;
    static atomic_uint nr_lines;
    uint64_t now_ns = util_now_ns();
    unsigned nr;
    va_list ap;

    if (now_ns - atomic_load(&since_ns) > LIMITED_NS) {
        atomic_store(&since_ns, now_ns);
        atomic_store(&nr_lines, 0);
    }
    nr = atomic_fetch_add(&nr_lines, 1);
    if (nr >= LIMITED_LINES)
        return;
    va_start(ap, fmt);
    log_v(fmt, ap);
    va_end(ap);
    if (nr + 1 == LIMITED_LINES)
        log_line("more of that kind will not be told for a while");
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
    format_line(err->line, sizeof(err->line), fmt, ap);
    va_end(ap);
    return code;
}

int err_usage(struct err *err, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    format_line(err->line, sizeof(err->line), fmt, ap);
    va_end(ap);
    err->is_usage = true;
    return -EINVAL;
}
