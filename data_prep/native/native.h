/* What the compiled sources share. */

#ifndef ZEROBERT_NATIVE_H
#define ZEROBERT_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

/* Make room for item number `index` of `width` values in an array that doubles at powers of two. */
#define ensure(array, index, width) \
    ensure_bytes((void **)(array), (index), (size_t)(width) * sizeof **(array))

static inline int ensure_bytes(void **array, int64_t index, size_t item_bytes)
{
    if (index & (index - 1))
        return 1; /* not at a power of two: there is room */
    void *larger = realloc(*array, (size_t)(index ? 2 * index : 1) * item_bytes);
    if (!larger)
        return 0;
    *array = larger;
    return 1;
}

#endif
