/* Text -> numbered words, sentences and documents; numbered words -> WordPiece ids.
 *
 * A word is cut off where every rule of the tokeniser looks at one side only: at spaces, and on both
 * sides of a character that is a token of its own whatever stands beside it (standalone_width). Text is
 * valid UTF-8 whose lines end with a newline. Functions return NULL where memory ran out. */

#include "native.h"

typedef struct {
    int64_t num_words, num_distinct, num_sentences, num_documents;
    int32_t *numbers;            /* [words]: which distinct word each one is, by first appearance */
    int64_t *word_spans;         /* [distinct, 2]: where each first stands, in bytes */
    int64_t *sentence_ends;      /* [sentences]: in words */
    int64_t *sentence_documents; /* [sentences]: which document each one is of */
    int64_t *document_spans;     /* [documents, 2]: in bytes, without blank lines around them */
} Words;

/* Distinct words by open addressing; a slot holds the number of a word and 1, or 0. */
typedef struct {
    int64_t num_slots;
    int32_t *slots;
    uint64_t *hashes; /* [distinct] */
} Table;

static uint32_t three_byte_character(const uint8_t *text)
{
    return (uint32_t)(text[0] & 0x0F) << 12 | (uint32_t)(text[1] & 0x3F) << 6 | (text[2] & 0x3F);
}

/* The bytes of the white space character that begins here, by Python's str.isspace; 0 if none does. */
static int blank_width(const uint8_t *text)
{
    uint8_t first = text[0];
    if (first < 0x80)
        return first == ' ' || (first >= 0x09 && first <= 0x0D) || (first >= 0x1C && first <= 0x1F);
    if (first == 0xC2)
        return text[1] == 0x85 || text[1] == 0xA0 ? 2 : 0;
    if (first < 0xE1 || first > 0xE3)
        return 0;
    uint32_t point = three_byte_character(text);
    return point == 0x1680 || (point >= 0x2000 && point <= 0x200A) || point == 0x2028 ||
                   point == 0x2029 || point == 0x202F || point == 0x205F || point == 0x3000
               ? 3
               : 0;
}

/* The bytes of the character that begins here if it always is a token of its own; else 0. These are
 * ASCII punctuation, the most common other punctuation, and Chinese characters. */
static int standalone_width(const uint8_t *text)
{
    uint8_t first = text[0];
    if (first < 0x80) {
        uint8_t letter = first | 0x20;
        int is_word = (letter >= 'a' && letter <= 'z') || (first >= '0' && first <= '9');
        return first > 0x20 && first != 0x7F && !is_word;
    }
    if (first < 0xE2 || first > 0xEF)
        return 0;
    uint32_t point = three_byte_character(text);
    return (point >= 0x4E00 && point <= 0x9FFF) || (point >= 0x3400 && point <= 0x4DBF) ||
                   (point >= 0x2010 && point <= 0x2027) || (point >= 0x3001 && point <= 0x3003) ||
                   (point >= 0x3008 && point <= 0x3011) || point == 0xFF01 || point == 0xFF08 ||
                   point == 0xFF09 || point == 0xFF0C || point == 0xFF1A || point == 0xFF1B ||
                   point == 0xFF1F
               ? 3
               : 0;
}

static int is_blank(const uint8_t *at, const uint8_t *end)
{
    while (at < end) {
        int width = blank_width(at);
        if (width == 0)
            return 0;
        at += width;
    }
    return 1;
}

/* Where the word that begins here ends, within a run without spaces. A run with a bracket is one word:
 * the library is to find a special token such as [SEP] in it. */
static const uint8_t *word_end(const uint8_t *at, const uint8_t *run_end, int has_bracket)
{
    if (has_bracket)
        return run_end;
    int width = standalone_width(at);
    if (width)
        return at + width;
    while (at < run_end && !standalone_width(at))
        at++;
    return at;
}

/* FNV-1a, its upper bits mixed into the lower ones, which choose the slot. */
static uint64_t hash(const uint8_t *at, const uint8_t *end)
{
    uint64_t value = 0xCBF29CE484222325u;
    for (; at < end; at++)
        value = (value ^ *at) * 0x100000001B3u;
    return value ^ value >> 29;
}

static int grow_table(Table *table, int64_t num_distinct)
{
    int64_t num_slots = table->num_slots ? 2 * table->num_slots : 1 << 14;
    free(table->slots);
    table->slots = calloc((size_t)num_slots, sizeof *table->slots);
    if (!table->slots)
        return 0;
    table->num_slots = num_slots;
    for (int64_t number = 0; number < num_distinct; number++) {
        uint64_t slot = table->hashes[number] & (uint64_t)(num_slots - 1);
        while (table->slots[slot])
            slot = (slot + 1) & (uint64_t)(num_slots - 1);
        table->slots[slot] = (int32_t)number + 1;
    }
    return 1;
}

/* The number of a word, a new one if it was not seen before; -1 where memory ran out. */
static int32_t number_of(Words *words, Table *table, const uint8_t *text, int64_t start, int64_t end)
{
    if (2 * words->num_distinct >= table->num_slots && !grow_table(table, words->num_distinct))
        return -1;
    uint64_t value = hash(text + start, text + end);
    uint64_t slot = value & (uint64_t)(table->num_slots - 1);
    while (table->slots[slot]) {
        int32_t number = table->slots[slot] - 1;
        const int64_t *span = words->word_spans + 2 * number;
        if (table->hashes[number] == value && span[1] - span[0] == end - start &&
            !memcmp(text + span[0], text + start, (size_t)(end - start)))
            return number;
        slot = (slot + 1) & (uint64_t)(table->num_slots - 1);
    }
    int64_t number = words->num_distinct;
    if (number == INT32_MAX || !ensure(&table->hashes, number, 1) ||
        !ensure(&words->word_spans, number, 2))
        return -1;
    table->slots[slot] = (int32_t)number + 1;
    table->hashes[number] = value;
    words->word_spans[2 * number] = start;
    words->word_spans[2 * number + 1] = end;
    words->num_distinct++;
    return (int32_t)number;
}

/* Number the words of one line. Returns -1 where memory ran out, else whether the line is blank. */
static int cut_line(Words *words, Table *table, const uint8_t *text, int64_t start, int64_t end)
{
    const uint8_t *at = text + start, *line_end = text + end;
    int blank = 1;
    while (at < line_end) {
        if (*at == ' ') {
            at++;
            continue;
        }
        const uint8_t *run_end = memchr(at, ' ', (size_t)(line_end - at));
        if (!run_end)
            run_end = line_end;
        int has_bracket = memchr(at, '[', (size_t)(run_end - at)) != NULL;
        while (at < run_end) {
            const uint8_t *next = word_end(at, run_end, has_bracket);
            blank = blank && is_blank(at, next);
            int32_t number = number_of(words, table, text, at - text, next - text);
            if (number < 0 || !ensure(&words->numbers, words->num_words, 1))
                return -1;
            words->numbers[words->num_words++] = number;
            at = next;
        }
    }
    return blank;
}

static int add_sentence(Words *words, int64_t start, int64_t end, int is_new_document)
{
    if (is_new_document) {
        if (!ensure(&words->document_spans, words->num_documents, 2))
            return 0;
        words->document_spans[2 * words->num_documents++] = start;
    }
    words->document_spans[2 * words->num_documents - 1] = end;
    if (!ensure(&words->sentence_ends, words->num_sentences, 1) ||
        !ensure(&words->sentence_documents, words->num_sentences, 1))
        return 0;
    words->sentence_ends[words->num_sentences] = words->num_words;
    words->sentence_documents[words->num_sentences++] = words->num_documents - 1;
    return 1;
}

static int cut_text(Words *words, Table *table, const uint8_t *text, int64_t size)
{
    int is_new_document = 1;
    for (int64_t start = 0; start < size;) {
        const uint8_t *newline = memchr(text + start, '\n', (size_t)(size - start));
        int64_t end = newline ? newline - text : size;
        int64_t num_words = words->num_words;
        int blank = cut_line(words, table, text, start, end);
        if (blank < 0)
            return 0;
        if (blank)
            words->num_words = num_words;
        else if (!add_sentence(words, start, end, is_new_document))
            return 0;
        is_new_document = blank;
        start = end + 1;
    }
    return 1;
}

EXPORTED void free_words(Words *words)
{
    if (!words)
        return;
    free(words->numbers);
    free(words->word_spans);
    free(words->sentence_ends);
    free(words->sentence_documents);
    free(words->document_spans);
    free(words);
}

/* Cut a text into words, sentences (lines) and documents (lines without a blank one between). */
EXPORTED Words *find_words(const uint8_t *text, int64_t size)
{
    Table table = {0};
    Words *words = calloc(1, sizeof *words);
    int is_done = words && cut_text(words, &table, text, size);
    free(table.slots);
    free(table.hashes);
    if (!is_done) {
        free_words(words);
        return NULL;
    }
    return words;
}

/* Put the pieces of every word in its place; what comes to nothing is left out.
 *
 * pieces, piece_starts: the ids of all distinct words, and where those of each begin.
 * tokens: has room for all pieces; gets them.
 * sentence_starts, document_starts: [sentences + 1], [documents + 1]; get where each begins.
 * kept: [documents]; gets which of the documents are left.
 * counts: gets the numbers of sentences and documents that are left. */
EXPORTED void put_pieces(const Words *words, const int32_t *pieces, const int64_t *piece_starts,
                         int32_t *tokens, int64_t *sentence_starts, int64_t *document_starts,
                         int64_t *kept, int64_t *counts)
{
    int64_t word = 0, num_tokens = 0, num_sentences = 0, num_documents = 0;
    sentence_starts[0] = document_starts[0] = 0;
    for (int64_t sentence = 0; sentence < words->num_sentences; sentence++) {
        for (; word < words->sentence_ends[sentence]; word++) {
            int32_t number = words->numbers[word];
            for (int64_t at = piece_starts[number]; at < piece_starts[number + 1]; at++)
                tokens[num_tokens++] = pieces[at];
        }
        if (num_tokens == sentence_starts[num_sentences])
            continue;
        sentence_starts[++num_sentences] = num_tokens;
        int64_t document = words->sentence_documents[sentence];
        if (num_documents == 0 || kept[num_documents - 1] != document)
            kept[num_documents++] = document;
        document_starts[num_documents] = num_sentences;
    }
    counts[0] = num_sentences;
    counts[1] = num_documents;
}
