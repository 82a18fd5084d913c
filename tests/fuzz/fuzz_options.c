// Numbers of the command line: what is taken is a number, in its range.

#include "fuzz.h"

#include <ctype.h>
#include <errno.h>
#include <string.h>

#include "util/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *text = malloc(len + 1);
    unsigned long n, min = len ? data[0] : 0, max = min + 100000;
    uint64_t bytes;
    size_t nr_digits;
    int ret;

    memcpy(text, data, len);
    text[len] = '\0';
    nr_digits = strspn(text, "0123456789");
    ret = util_parse_size(text, &bytes);
    must(ret == 0 || ret == -EINVAL || ret == -ERANGE);
    if (!ret) {
        must(bytes <= INT64_MAX);
        must(nr_digits && strlen(text) - nr_digits <= 1);
        must(!text[nr_digits] || strchr("KMGTkmgt", text[nr_digits]));
        must(!text[nr_digits] || bytes % 1024 == 0);
    }
    ret = util_parse_uint(text, min, max, &n);
    must(ret == 0 || ret == -EINVAL || ret == -ERANGE);
    if (!ret)
        must(n >= min && n <= max && nr_digits == strlen(text));
    if (nr_digits && nr_digits == strlen(text))
        must(ret != -EINVAL);
    free(text);
    return 0;
}
