/* Tokenised documents -> sentence pairs with masks, draw for draw as NVIDIA's
 * create_pretraining_data.py makes them; data_prep/instances.py says the same in Python.
 *
 * The sentences of a document stand one after the other, so a segment is a slice of the tokens. */

#include "native.h"

#define STATE_WORDS 624
#define STATE_SHIFT 397
#define RANDOM_DOCUMENT_DRAWS 10

typedef struct {
    int64_t seq_length, max_predictions;
    int64_t num_passes;
    double short_seq_prob;
    int64_t no_nsp, whole_word_mask;
    int64_t vocab_size, cls_id, sep_id, mask_id;
    const int64_t *num_masks;  /* [seq_length + 1], by the number of tokens of a row */
    const uint8_t *continues;  /* [vocab_size]: whether the piece goes on with the word before it */
} Rules;

typedef struct {
    const int32_t *tokens;
    const int64_t *sentence_starts; /* [sentences + 1], in tokens */
    const int64_t *document_starts; /* [documents + 1], in sentences */
    int64_t num_documents;
} Documents;

typedef struct {
    int64_t start, end; /* in tokens */
} Slice;

typedef struct {
    Slice first, second;
    int32_t num_masks, label;
} Row;

typedef struct {
    int32_t position, shown;
} Mask;

typedef struct {
    int64_t num_rows;
    Row *rows;
    Mask *masks;    /* [rows, max_predictions], positions ascending */
    int64_t *order; /* [rows]: which row stands at each place */
} Rows;

/* What the work on one row needs: its tokens; the first position of every unit that is masked as a
 * whole, and by that position its length; which token each position shows, -1 where it is not masked. */
typedef struct {
    int32_t *ids, *units, *lengths, *shown;
} Scratch;

/* ---- CPython's random.Random: MT19937. The state is its words and, last, how many are used up.
 * Source: CPython's Modules/_randommodule.c and Lib/random.py. */

static inline uint32_t twisted(uint32_t upper, uint32_t lower, uint32_t shifted)
{
    uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7FFFFFFFu);
    return shifted ^ mixed >> 1 ^ (0x9908B0DFu & -(mixed & 1));
}

static void twist(uint32_t *state)
{
    int i = 0;
    for (; i < STATE_WORDS - STATE_SHIFT; i++)
        state[i] = twisted(state[i], state[i + 1], state[i + STATE_SHIFT]);
    for (; i < STATE_WORDS - 1; i++)
        state[i] = twisted(state[i], state[i + 1], state[i + STATE_SHIFT - STATE_WORDS]);
    state[i] = twisted(state[i], state[0], state[STATE_SHIFT - 1]);
    state[STATE_WORDS] = 0;
}

static inline uint32_t random_word(uint32_t *state)
{
    if (state[STATE_WORDS] >= STATE_WORDS)
        twist(state);
    uint32_t word = state[state[STATE_WORDS]++];
    word ^= word >> 11;
    word ^= word << 7 & 0x9D2C5680u;
    word ^= word << 15 & 0xEFC60000u;
    return word ^ word >> 18;
}

/* random(): 53 bits of two words. */
static inline double random_share(uint32_t *state)
{
    uint32_t high = random_word(state) >> 5, low = random_word(state) >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
}

/* randint(0, limit - 1), 0 < limit < 2^32: as many bits as the limit has, until they are below it. */
static inline int64_t random_below(uint32_t *state, int64_t limit)
{
    int shift = __builtin_clz((uint32_t)limit);
    uint32_t drawn;
    do
        drawn = random_word(state) >> shift;
    while (drawn >= limit);
    return drawn;
}

#define SHUFFLE(state, values, count, type)                      \
    for (int64_t i_ = (count) - 1; i_ > 0; i_--) {               \
        int64_t j_ = random_below(state, i_ + 1);                \
        type kept_ = (values)[i_];                               \
        (values)[i_] = (values)[j_];                             \
        (values)[j_] = kept_;                                    \
    }

/* ---- Segments */

static int64_t length_of(Slice slice) { return slice.end - slice.start; }

/* Most rows are as long as can be; some are shorter, as texts are in use. */
static int64_t target_length(uint32_t *state, const Rules *rules, int64_t max_tokens)
{
    if (random_share(state) < rules->short_seq_prob)
        return 2 + random_below(state, max_tokens - 1);
    return max_tokens;
}

static int64_t other_document(uint32_t *state, int64_t num_documents, int64_t own)
{
    int64_t other = own;
    for (int draw = 0; draw < RANDOM_DOCUMENT_DRAWS && other == own; draw++)
        other = random_below(state, num_documents);
    return other;
}

/* Sentences from a random one on, until the target is reached or the document ends. */
static Slice random_segment(uint32_t *state, const Documents *documents, int64_t document,
                            int64_t target)
{
    const int64_t *starts = documents->sentence_starts;
    int64_t begin = documents->document_starts[document];
    int64_t end = documents->document_starts[document + 1];
    int64_t first = begin + random_below(state, end - begin), last = first + 1;
    while (last < end && starts[last] - starts[first] < target)
        last++;
    return (Slice){starts[first], starts[last]};
}

/* Shorten the longer slice, token by token, at either end, until both fit. */
static void truncate_pair(uint32_t *state, Slice *first, Slice *second, int64_t max_tokens)
{
    while (length_of(*first) + length_of(*second) > max_tokens) {
        Slice *longer = length_of(*first) > length_of(*second) ? first : second;
        if (random_share(state) < 0.5)
            longer->start++;
        else
            longer->end--;
    }
}

/* ---- Masks */

/* The tokens of a row: [CLS] first [SEP] second [SEP], or without what belongs to the second. Returns
 * their number. */
static int64_t write_tokens(const Row *row, const int32_t *tokens, const Rules *rules, int32_t *ids)
{
    int64_t end = 0;
    ids[end++] = (int32_t)rules->cls_id;
    memcpy(ids + end, tokens + row->first.start, (size_t)length_of(row->first) * sizeof *ids);
    end += length_of(row->first);
    ids[end++] = (int32_t)rules->sep_id;
    if (rules->no_nsp)
        return end;
    memcpy(ids + end, tokens + row->second.start, (size_t)length_of(row->second) * sizeof *ids);
    end += length_of(row->second);
    ids[end++] = (int32_t)rules->sep_id;
    return end;
}

/* Find what is masked together: single tokens, or whole words. Returns the number of units. */
static int64_t find_units(const Rules *rules, const Scratch *scratch, int64_t num_tokens)
{
    int64_t count = 0;
    int follows_word = 0;
    for (int64_t position = 0; position < num_tokens; position++) {
        int32_t token = scratch->ids[position];
        if (token == rules->cls_id || token == rules->sep_id) {
            follows_word = 0;
        } else if (follows_word && rules->continues[token]) {
            scratch->lengths[scratch->units[count - 1]]++;
        } else {
            scratch->units[count++] = (int32_t)position;
            scratch->lengths[position] = 1;
            follows_word = rules->whole_word_mask != 0;
        }
    }
    return count;
}

static int32_t shown_token(uint32_t *state, const Rules *rules, int32_t token)
{
    if (random_share(state) < 0.8)
        return (int32_t)rules->mask_id;
    if (random_share(state) < 0.5)
        return token;
    return (int32_t)random_below(state, rules->vocab_size);
}

static void mask_row(uint32_t *state, const Rules *rules, const Scratch *scratch, Row *row,
                     int64_t num_tokens, Mask *masks)
{
    int64_t num_units = find_units(rules, scratch, num_tokens);
    int64_t num_wanted = rules->num_masks[num_tokens], num_masked = 0;
    SHUFFLE(state, scratch->units, num_units, int32_t)
    for (int64_t position = 0; position < num_tokens; position++)
        scratch->shown[position] = -1;
    for (int64_t unit = 0; unit < num_units && num_masked < num_wanted; unit++) {
        int64_t start = scratch->units[unit], length = scratch->lengths[start];
        if (num_masked + length > num_wanted)
            continue;
        for (int64_t position = start; position < start + length; position++)
            scratch->shown[position] = shown_token(state, rules, scratch->ids[position]);
        num_masked += length;
    }
    row->num_masks = 0;
    for (int64_t position = 0; position < num_tokens; position++)
        if (scratch->shown[position] >= 0)
            masks[row->num_masks++] = (Mask){(int32_t)position, scratch->shown[position]};
}

/* ---- Rows */

static int add_row(uint32_t *state, const Documents *documents, const Rules *rules,
                   const Scratch *scratch, Rows *made, Row row)
{
    if (!ensure(&made->rows, made->num_rows, 1) ||
        !ensure(&made->masks, made->num_rows, rules->max_predictions))
        return 0;
    int64_t num_tokens = write_tokens(&row, documents->tokens, rules, scratch->ids);
    mask_row(state, rules, scratch, &row, num_tokens,
             made->masks + made->num_rows * rules->max_predictions);
    made->rows[made->num_rows++] = row;
    return 1;
}

/* The sentence pairs of one document. */
static int add_pairs(uint32_t *state, const Documents *documents, const int64_t *order,
                     int64_t index, const Rules *rules, const Scratch *scratch, Rows *made)
{
    const int64_t *starts = documents->sentence_starts;
    int64_t max_tokens = rules->seq_length - 3;
    int64_t target = target_length(state, rules, max_tokens);
    int64_t end = documents->document_starts[order[index] + 1];
    int64_t chunk = documents->document_starts[order[index]]; /* the pair's first sentence */
    for (int64_t i = chunk; i < end; i++) {
        if (i < end - 1 && starts[i + 1] - starts[chunk] < target)
            continue;
        int64_t count = i + 1 - chunk;
        int64_t split = chunk + (count >= 2 ? 1 + random_below(state, count - 1) : 1);
        Row row = {.first = {starts[chunk], starts[split]}, .second = {starts[split], starts[i + 1]}};
        if (count == 1 || random_share(state) < 0.5) {
            int64_t other = other_document(state, documents->num_documents, index);
            row.label = other != index;
            row.second =
                random_segment(state, documents, order[other], target - length_of(row.first));
            i = split - 1; /* the sentences that were not used go back */
        }
        truncate_pair(state, &row.first, &row.second, max_tokens);
        if (!add_row(state, documents, rules, scratch, made, row))
            return 0;
        chunk = i + 1;
    }
    return 1;
}

/* Rows of one segment, for training without next-sentence prediction. */
static int add_segments(uint32_t *state, const Documents *documents, const int64_t *order,
                        int64_t index, const Rules *rules, const Scratch *scratch, Rows *made)
{
    const int64_t *starts = documents->sentence_starts;
    int64_t max_tokens = rules->seq_length - 2;
    int64_t target = target_length(state, rules, max_tokens);
    int64_t end = documents->document_starts[order[index] + 1];
    int64_t chunk = documents->document_starts[order[index]];
    for (int64_t i = chunk; i < end; i++) {
        if (i < end - 1 && starts[i + 1] - starts[chunk] < target)
            continue;
        Row row = {.first = {starts[chunk], starts[i + 1]}};
        truncate_pair(state, &row.first, &row.second, max_tokens);
        if (!add_row(state, documents, rules, scratch, made, row))
            return 0;
        chunk = i + 1;
    }
    return 1;
}

static int64_t *new_order(int64_t count, uint32_t *state)
{
    int64_t *order = malloc((size_t)(count ? count : 1) * sizeof *order);
    if (order) {
        for (int64_t i = 0; i < count; i++)
            order[i] = i;
        SHUFFLE(state, order, count, int64_t)
    }
    return order;
}

static int build(uint32_t *state, const Documents *documents, const Rules *rules,
                 const Scratch *scratch, Rows *made)
{
    int64_t *order = new_order(documents->num_documents, state);
    int is_done = order != NULL;
    for (int64_t pass = 0; is_done && pass < rules->num_passes; pass++)
        for (int64_t index = 0; is_done && index < documents->num_documents; index++)
            is_done = (rules->no_nsp ? add_segments : add_pairs)(state, documents, order, index,
                                                                 rules, scratch, made);
    free(order);
    return is_done && (made->order = new_order(made->num_rows, state));
}

EXPORTED void free_rows(Rows *made)
{
    if (!made)
        return;
    free(made->rows);
    free(made->masks);
    free(made->order);
    free(made);
}

/* All rows of a shard. `state` has 625 values and moves on. Returns NULL where memory ran out. */
EXPORTED Rows *build_rows(uint32_t *state, const Documents *documents, const Rules *rules)
{
    Rows *made = calloc(1, sizeof *made);
    int32_t *room = malloc(4 * (size_t)rules->seq_length * sizeof *room);
    Scratch scratch = {room, room + rules->seq_length, room + 2 * rules->seq_length,
                       room + 3 * rules->seq_length};
    int is_done = made && room && build(state, documents, rules, &scratch, made);
    free(room);
    if (!is_done) {
        free_rows(made);
        return NULL;
    }
    return made;
}

/* Write the rows from place `start` to before `stop` into arrays that hold zeros. */
EXPORTED void read_rows(const Rows *made, const int32_t *tokens, const Rules *rules, int64_t start,
                        int64_t stop, int32_t *input_ids, int8_t *input_mask, int8_t *segment_ids,
                        int32_t *masked_lm_positions, int32_t *masked_lm_ids,
                        int8_t *next_sentence_labels)
{
    for (int64_t place = start; place < stop; place++) {
        int64_t at = (place - start) * rules->seq_length;
        int64_t mask_at = (place - start) * rules->max_predictions;
        const Row *row = made->rows + made->order[place];
        const Mask *masks = made->masks + made->order[place] * rules->max_predictions;
        int32_t *ids = input_ids + at;
        int64_t num_tokens = write_tokens(row, tokens, rules, ids);
        int64_t second_start = 2 + length_of(row->first);
        memset(input_mask + at, 1, (size_t)num_tokens);
        memset(segment_ids + at + second_start, 1, (size_t)(num_tokens - second_start));
        for (int64_t i = 0; i < row->num_masks; i++) {
            masked_lm_positions[mask_at + i] = masks[i].position;
            masked_lm_ids[mask_at + i] = ids[masks[i].position];
            ids[masks[i].position] = masks[i].shown;
        }
        next_sentence_labels[place - start] = (int8_t)row->label;
    }
}
