/* Codes back into numbers, in one pass over the target: what store/blocks/kernels.py calls where this could be built.

   Plain C, so that compilers vectorise it, and no Python.h, so that a compiler is all it takes. Products and sums are
   rounded one by one as torch does it (built with -ffp-contract=off): the same codes give the same bits either way. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define STREAMS
#endif
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
#ifdef _WIN32
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

#define MOST 1024 /* values of a row; kernels.py asks for no more */

PUBLIC int attnstore_most(void) { return MOST; }

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float found;
    if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) bits = sign | ((rest << 13) + 0x38000000);
    else { /* a small one: so many times 2 ** -24 */
        found = (float)rest * 5.9604644775390625e-08f;
        memcpy(&bits, &found, 4);
        bits |= sign;
    }
    memcpy(&found, &bits, 4);
    return found;
}

/* A group's numbers for every value of a row, in the order in which these are coded. */
static void spread(const uint16_t *halves, const uint8_t *order, float *row, long dim, long columns) {
    long each = dim / columns;
    for (long place = 0; place < dim; place++) row[place] = from_half(halves[(order ? order[place] : place) / each]);
}

FAST static void bytes_by(const int8_t *codes, const float *restrict steps, float *restrict out, long rows, long dim) {
    for (long row = 0; row < rows; row++, codes += dim, out += dim)
        for (long place = 0; place < dim; place++) out[place] = (float)codes[place] * steps[place];
}

FAST static void bytes_from(const int8_t *codes, const float *restrict steps, const float *restrict lowest,
                            float *restrict out, long rows, long dim) {
    for (long row = 0; row < rows; row++, codes += dim, out += dim)
        for (long place = 0; place < dim; place++) out[place] = (float)codes[place] * steps[place] + lowest[place];
}

FAST static void bytes_by_one(const int8_t *codes, float step, float *restrict out, long dim) {
    for (long place = 0; place < dim; place++) out[place] = (float)codes[place] * step;
}

/* Two channels in a byte, of which the low one has so many bits; out come all low ones, then the others. */
FAST static void shared_by(const uint8_t *codes, const uint32_t *restrict widths, const uint32_t *restrict masks,
                           const float *restrict steps, const float *restrict lowest, float *restrict out, long rows,
                           long dim) {
    long half = dim / 2;
    for (long row = 0; row < rows; row++, codes += half, out += dim)
        for (long place = 0; place < half; place++) {
            uint32_t code = codes[place];
            out[place] = (float)(int32_t)(code & masks[place]) * steps[place] + lowest[place];
            out[half + place] = (float)(int32_t)(code >> widths[place]) * steps[half + place] + lowest[half + place];
        }
}

/* The same where a run of channels shares its numbers and they are in their own order: no need to spread these. */
FAST static void shared_by_runs(const uint8_t *codes, const uint16_t *steps, const uint16_t *lowest,
                                float *restrict out, long dim, long columns) {
    long half = dim / 2, each = dim / columns, run = each < half ? each : half;
    for (long start = 0; start < half; start += run) {
        long first = start / each, second = (half + start) / each;
        float step = from_half(steps[first]), low = from_half(lowest[first]);
        float other = from_half(steps[second]), least = from_half(lowest[second]);
        for (long place = start; place < start + run; place++) {
            out[place] = (float)(int32_t)(codes[place] & 15) * step + low;
            out[half + place] = (float)(int32_t)(codes[place] >> 4) * other + least;
        }
    }
}

static void ordered(const float *from, const uint8_t *order, float *restrict out, long rows, long dim) {
    for (long row = 0; row < rows; row++, from += dim, out += dim)
        for (long place = 0; place < dim; place++) out[order[place]] = from[place];
}

FAST static void to_bfloat16(const float *restrict values, uint16_t *restrict out, long count) {
    for (long place = 0; place < count; place++) {
        uint32_t bits;
        memcpy(&bits, values + place, 4);
        out[place] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/* Rows into place, past the caches where that is possible: a target is larger than these, and to fetch what is about to
   be overwritten takes as long as writing it. */
static void put(const void *from, char *out, long nbytes) {
#ifdef STREAMS
    if (((uintptr_t)out & 15) == 0 && nbytes % 16 == 0) {
        for (long place = 0; place < nbytes; place += 16)
            _mm_stream_si128((__m128i *)(out + place), _mm_loadu_si128((const __m128i *)((const char *)from + place)));
        return;
    }
#endif
    memcpy(out, from, (size_t)nbytes);
}

/* Codes [several, heads, tokens, dim] of a signed byte, or [..., dim / 2] of two channels where they are `shared`, times
   their steps [several, heads, rows, columns], plus the lowest if there are any, into `out`, float32 or bfloat16, whose
   rows are contiguous. `order` and `widths` say how channels share bytes; without them by halves. Distances in values.
   Not 0 if the order is none. */
PUBLIC int attnstore_scaled_by(const uint8_t *codes, int shared, long codes_apart, const uint16_t *steps, long steps_apart,
                            const uint16_t *lowest, long lowest_apart, const uint8_t *order, long order_apart,
                            const uint8_t *widths, long widths_apart, void *out, long out_apart, long heads_apart,
                            int bfloat16, long several, long heads, long tokens, long dim, long rows, long columns) {
    float own[MOST], least[MOST], aside[MOST], turned[MOST];
    uint32_t bits[MOST], masks[MOST];
    uint16_t halved[MOST];
    long each = tokens / rows, width = shared ? dim / 2 : dim, most = MOST / dim;
    int runs = shared && !order && (columns == 1 || columns % 2 == 0);
    for (long one = 0; one < several; one++)
        for (long head = 0; head < heads; head++) {
            const uint8_t *from = codes + one * codes_apart + head * tokens * width;
            const uint8_t *channels = order ? order + one * order_apart + head * dim : 0;
            const uint8_t *lows = widths ? widths + one * widths_apart + head * width : 0;
            long place = one * out_apart + head * heads_apart;
            for (long pair = 0; shared && pair < width; pair++) {
                bits[pair] = lows ? lows[pair] : 4;
                if (bits[pair] > 8) return 1;
                masks[pair] = (1u << bits[pair]) - 1;
            }
            char seen[256] = {0};
            for (long channel = 0; channels && channel < dim; channel++)
                if (channels[channel] >= dim || seen[channels[channel]]++) return 1;
            for (long row = 0; row < rows; row++) {
                long group = (head * rows + row) * columns;
                const uint16_t *step = steps + one * steps_apart + group;
                const uint16_t *low = lowest ? lowest + one * lowest_apart + group : 0;
                int single = columns == 1 && !lowest;
                if (!single && !runs) spread(step, channels, own, dim, columns);
                if (lowest && !runs) spread(low, channels, least, dim, columns);
                for (long left = each; left > 0;) {
                    long count = left < most ? left : most, values = count * dim;
                    float *made = aside;
                    for (long token = 0; runs && token < count; token++)
                        shared_by_runs(from + token * width, step, low, aside + token * dim, dim, columns);
                    if (runs) {}
                    else if (shared) shared_by(from, bits, masks, own, least, aside, count, dim);
                    else if (lowest) bytes_from((const int8_t *)from, own, least, aside, count, dim);
                    else if (single) bytes_by_one((const int8_t *)from, from_half(*step), aside, values);
                    else bytes_by((const int8_t *)from, own, aside, count, dim);
                    if (channels) ordered(aside, channels, made = turned, count, dim);
                    if (bfloat16) to_bfloat16(made, halved, values);
                    if (bfloat16) put(halved, (char *)out + 2 * place, 2 * values);
                    else put(made, (char *)out + 4 * place, 4 * values);
                    from += count * width, place += values, left -= count;
                }
            }
        }
#ifdef STREAMS
    _mm_sfence();
#endif
    return 0;
}

/* What `lossless` takes apart, put together: the sign is last, the exponent in the first byte. */
FAST PUBLIC void attnstore_joined32(const uint8_t *restrict first, const uint8_t *restrict second,
                                    const uint16_t *restrict low, uint32_t *restrict out, long count) {
    for (long place = 0; place < count; place++) {
        uint32_t turned = (uint32_t)first[place] << 24 | (uint32_t)second[place] << 16 | low[place];
        out[place] = turned >> 1 | turned << 31;
    }
}

FAST PUBLIC void attnstore_joined16(const uint8_t *restrict first, const uint8_t *restrict second,
                                    uint16_t *restrict out, long count) {
    for (long place = 0; place < count; place++) {
        uint32_t turned = (uint32_t)first[place] << 8 | second[place];
        out[place] = (uint16_t)(turned >> 1 | turned << 15);
    }
}
