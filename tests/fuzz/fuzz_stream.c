// The request stream of a connection, on a real device. The first byte says in which mode, on which ring, and
// how much of it came with the handshake; the rest is the stream, whose cookies are numbered so that replies
// can be told apart.

#include "fuzz_device.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "../unit/session.h"
#include "util/util.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    make_devices();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    unsigned choice = len ? data[0] : 0;
    enum nbd_mode mode = (enum nbd_mode)((choice & 3) % 3);
    size_t stream_len = len ? len - 1 : 0, early = min_of(stream_len, (choice >> 4) * 20);
    uint8_t *stream = malloc(stream_len + !stream_len);
    struct asked_list list;
    struct session session;
    const char *wrong;

    if (stream_len)
        memcpy(stream, data + 1, stream_len);
    list = session_number(stream, stream_len, mode);
    must(session_begin(&session, the_main_ring, devs[choice >> 2 & 1], mode, choice & 8, stream, early));
    must(session_send(&session, stream + early, stream_len - early));
    must(session_finish(&session));
    wrong = session_check(&list, session.in.bytes, session.in.len, mode);
    if (wrong)
        fprintf(stderr, "replies: %s\n", wrong);
    must(!wrong);
    must(session_end(&session));
    free(list.asked);
    free(stream);
    return 0;
}
