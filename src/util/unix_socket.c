#include "util/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 4096 // or what net.core.somaxconn allows
#define LINGER_US 20000
#define LINGER_TRIES 15

// Whether somebody listens at sun: 0, or what connect() failed with. A server that was killed does until
// the kernel has taken its rings apart, which hold the socket: it is asked again for a while.
static int unix_socket_probe(const struct sockaddr_un *sun)
{
    for (unsigned i = 0;; i++) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), ret;

        if (fd < 0)
            return -errno;
        ret = connect(fd, (const struct sockaddr *)sun, sizeof(*sun)) < 0 ? -errno : 0;
        close(fd);
        if (ret < 0 || i == LINGER_TRIES)
            return ret;
        usleep(LINGER_US);
    }
}

// A path without a listener behind it, or a negative errno.
static int unix_socket_clear_path(const char *what, const struct sockaddr_un *sun, struct err *err)
{
    struct statx stx;
    int ret;

    // Not asking who serves a FUSE file that is there: that may be us, who do not serve yet.
    if (statx(AT_FDCWD, sun->sun_path, AT_SYMLINK_NOFOLLOW | AT_STATX_DONT_SYNC, STATX_TYPE, &stx) < 0)
        return 0; // bind() will tell what is wrong, if anything
    if (!S_ISSOCK(stx.stx_mode))
        return err_set(err, -EEXIST, "%s%s: exists and is no socket; use another path", what, sun->sun_path);
    ret = unix_socket_probe(sun);
    if (ret != -ECONNREFUSED) // EAGAIN: somebody listens and is busy
        return err_set(err, -EADDRINUSE, "%s%s: somebody listens there; stop it, or use another path", what,
                       sun->sun_path);
    if (unlink(sun->sun_path) < 0)
        return err_set(err, -errno, "%s%s: removing the stale socket: %s", what, sun->sun_path,
                       strerror(errno));
    return 0;
}

int unix_socket_listen(const char *what, const char *path, struct err *err)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    int fd, ret;

    if (!*path || strlen(path) >= sizeof(sun.sun_path))
        return err_usage(err, "%s%s: a path of 1 to %zu bytes is needed", what, path,
                         sizeof(sun.sun_path) - 1);
    strcpy(sun.sun_path, path);
    ret = unix_socket_clear_path(what, &sun, err);
    if (ret < 0)
        return ret;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(err, -errno, "%s%s: socket: %s", what, path, strerror(errno));
    if (bind(fd, (struct sockaddr *)&sun, sizeof(sun)) < 0 || listen(fd, BACKLOG) < 0) {
        ret = err_set(err, -errno, "%s%s: %s; use a directory that you may write to", what, path,
                      strerror(errno));
        close(fd);
        return ret;
    }
    return fd;
}

void unix_socket_unlisten(int fd)
{
    struct sockaddr_un sun, other;
    socklen_t len = sizeof(sun);
    int probe;

    // The kernel takes our rings apart after the process has ended, and they hold the socket: a port
    // would stay taken until then.
    shutdown(fd, SHUT_RDWR);
    memset(&sun, 0, sizeof(sun));
    if (getsockname(fd, (struct sockaddr *)&sun, &len) < 0 || sun.sun_family != AF_UNIX || !sun.sun_path[0])
        return;
    // Ours still? Now that we do not listen, whoever took the path over answers, and nobody else does.
    other = sun;
    probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return;
    if (connect(probe, (struct sockaddr *)&other, sizeof(other)) < 0 && errno == ECONNREFUSED)
        unlink(sun.sun_path);
    close(probe);
}

void unix_socket_remove_stale(const char *path)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof(sun.sun_path))
        return;
    strcpy(sun.sun_path, path);
    unix_socket_clear_path("", &sun, &(struct err){.line = ""});
}

uint64_t unix_socket_sndbuf(int fd)
{
    int domain, bytes;
    socklen_t domain_len = sizeof(domain), len = sizeof(bytes);

    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &domain_len) < 0 || domain != AF_UNIX ||
        getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, &len) < 0)
        return 0;
    return (uint64_t)bytes;
}
