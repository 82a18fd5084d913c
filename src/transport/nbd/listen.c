#include "transport/nbd/listen.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/unix_socket.h"
#include "util/util.h"

#define BACKLOG 4096 // or what net.core.somaxconn allows

static int listen_addrinfo(const struct addrinfo *ai)
{
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1, ret;

    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0) {
        ret = -errno;
        close(fd);
        return ret;
    }
    return fd;
}

// "HOST:PORT", "[V6]:PORT", ":PORT": split at the last colon.
static int listen_tcp(const char *option, const char *addr, struct err *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found, *ai;
    const char *colon = strrchr(addr, ':'), *host = addr;
    size_t host_len = colon ? (size_t)(colon - addr) : 0;
    unsigned long port;
    char name[256];
    int ret;

    // getaddrinfo() would take a number that is too large modulo 65,536.
    if (!colon || host_len >= sizeof(name) || util_parse_uint(colon + 1, 0, 65535, &port) < 0)
        return err_usage(err, "%s: %s: no such address; use unix:PATH or HOST:PORT", option, addr);
    if (host_len >= 2 && host[0] == '[' && host[host_len - 1] == ']') {
        host++;
        host_len -= 2;
    }
    memcpy(name, host, host_len);
    name[host_len] = '\0';
    ret = getaddrinfo(host_len ? name : NULL, colon + 1, &hints, &found);
    if (ret)
        return err_usage(err, "%s: %s: %s; use unix:PATH or HOST:PORT", option, addr, gai_strerror(ret));
    // Without a host, "::" takes IPv4 as well: the families are tried in that order.
    ret = -EADDRNOTAVAIL;
    for (ai = found; ai && ret < 0; ai = ai->ai_next) {
        if (host_len || ai->ai_family == AF_INET6)
            ret = listen_addrinfo(ai);
    }
    for (ai = found; ai && ret < 0 && !host_len; ai = ai->ai_next)
        ret = listen_addrinfo(ai);
    freeaddrinfo(found);
    if (ret < 0)
        return err_set(err, ret, "%s: %s: %s; use another address or port", option, addr, strerror(-ret));
    return ret;
}

int nbd_listen(const char *option, const char *addr, struct err *err)
{
    char what[32];

    snprintf(what, sizeof(what), "%s: unix:", option);
    if (!strncmp(addr, "unix:", 5))
        return unix_socket_listen(what, addr + 5, err);
    return listen_tcp(option, addr, err);
}

// RFC 3986, section 2.1.
static void percent_encode(const char *text, char *to, size_t to_bytes)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";

    for (; *text && to_bytes > 4; text++) {
        int n = snprintf(to, to_bytes, strchr(plain, *text) ? "%c" : "%%%02X", (unsigned char)*text);

        to += n;
        to_bytes -= (size_t)n;
    }
    *to = '\0';
}

void nbd_listen_uri(int fd, char *uri, unsigned uri_bytes)
{
    char path[3 * sizeof(((struct sockaddr_un *)0)->sun_path) + 4];
    struct sockaddr_storage ss;
    socklen_t len = sizeof(ss);
    char host[NI_MAXHOST], port[NI_MAXSERV];

    memset(&ss, 0, sizeof(ss));
    if (getsockname(fd, (struct sockaddr *)&ss, &len) < 0)
        snprintf(uri, uri_bytes, "fd %d", fd);
    else if (ss.ss_family == AF_UNIX) {
        percent_encode(((struct sockaddr_un *)&ss)->sun_path, path, sizeof(path));
        snprintf(uri, uri_bytes, "nbd+unix:///?socket=%s", path);
    } else if (getnameinfo((struct sockaddr *)&ss, len, host, sizeof(host), port, sizeof(port),
                           NI_NUMERICHOST | NI_NUMERICSERV))
        snprintf(uri, uri_bytes, "fd %d", fd);
    else
        snprintf(uri, uri_bytes, ss.ss_family == AF_INET6 ? "nbd://[%s]:%s" : "nbd://%s:%s", host, port);
}
