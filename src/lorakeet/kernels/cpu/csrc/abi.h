/* Application binary interface: numbers and structs that C and Python share.
 *
 * cpu/abi.py mirrors this file. abi.c hands out each value, size and offset by name, and abi.py compares them at load.
 */
#ifndef LORAKEET_ABI_H
#define LORAKEET_ABI_H

#include <stddef.h>
#include <stdint.h>

enum {
    LK_GROUP = 64,           /* columns of a gradient that share a scale (gemm_w8a8_grouped.c) */
    LK_FEEDBACK = 16,        /* columns: distance over which a rounding error is carried forward (error feedback) */
    LK_MAX_FUSED_RANK = 64,  /* largest rank of a low-rank product that gemm_w8a16.c adds in its epilogue */
    LK_MAX_HEAD_WIDTH = 128, /* values of an attention head, at most (attention.c) */
    LK_HEAD_STEP = 16,       /* an attention head's width is a multiple of this */
    LK_LINEARS = 7,          /* linear layers of a decoder layer that adapters update: q, k, v, o, gate, up, down */
    LK_PAGE_STEP = 16,       /* tokens of a page are a multiple of this (paged_attention.c) */
    LK_PAIRS = 0,            /* int8 products: 16-bit activations and gradients (gemm_w8a16.c), */
    LK_VNNI = 1,             /* gradients in 8 bits by groups (gemm_w8a8_grouped.c), */
    LK_AMX = 2,              /* or the same in tiles (gemm_amx.c) */
    LK_BF16 = 3,             /* products of a weight that is stored in bf16, */
    LK_FP16 = 4,             /* or in fp16 (gemm_half.c) */
    LK_WORK = 6              /* kinds of work whose time is measured (training.h) */
};

/* A linear layer of a decoder, and the low-rank update scaling B A x of an adapter where rank > 0. An adapter may also
 * scale the outputs and add to them. */
struct lk_linear {
    const int8_t *weight;           /* [out, in]; or codes of NF4, with `absmax` */
    const void *absmax;             /* scales of NF4, or NULL */
    const float *nested;            /* scales of those scales, or NULL */
    const float *row_scale;         /* [out] */
    const float *column_scale;      /* [in], or NULL */
    const float *outlier_positions; /* [outliers]: columns that stay fp32, as numbers */
    const float *outlier_values;    /* [outliers, out] */
    const float *bias;              /* [out], or NULL */
    const float *a, *b;             /* [rank, in] and [out, rank] */
    const float *output;            /* [2, out]: a factor of each output and what is added then, or NULL */
    ptrdiff_t out, in, rank, outliers;
    float scaling;
};

struct lk_norm {
    const float *weight; /* NULL: there is none */
    float eps;
};

/* A decoder layer of the Llama family. */
struct lk_layer {
    struct lk_linear q, k, v, o, gate, up, down;
    struct lk_norm before, after, of_q, of_k; /* of_q and of_k for each head */
    ptrdiff_t heads, kv_heads, head_width;
    float scaling;
};

/* The low-rank update of a linear layer, as lk_pack_update lays it out. */
struct lk_update {
    const int16_t *codes; /* of A and then of B */
    const float *scale;   /* [rank]: factor of a row of A and a column of B together */
    const float *output;  /* [2, out]: a factor of each output and what is added then, or NULL */
    ptrdiff_t rank;       /* 0: none */
};

/* Rows of a step, each a token of a sequence whose keys and values lie in pages. */
struct lk_paged {
    const struct lk_layer *const *layers;
    float *keys, *values;              /* [layers, pages, kv_heads, page_tokens, head_width] */
    const int64_t *tables;             /* the pages of all sequences, one sequence after the other */
    const int64_t *starts, *positions; /* [n]: where the pages of a row's sequence begin in `tables`; its position there */
    const float *cosine, *sine;        /* [n, head_width] */
    const struct lk_update *const *updates; /* [n]: the adapter of each row, [layers][LK_LINEARS]; NULL: none */
    ptrdiff_t count, pages, page_tokens;    /* count: layers; pages: in the pool */
    ptrdiff_t n, length, rank;              /* length: largest position + 1; rank: of all updates, at most */
    int amx;                                /* multiply many rows in tiles of AMX */
};

/* A tensor [total, heads, width] whose last dimension is contiguous. */
struct lk_heads {
    float *data;
    ptrdiff_t token_stride, head_stride; /* in floats */
};

struct lk_attention {
    ptrdiff_t heads, kv_heads, head_width; /* head_width is a multiple of LK_HEAD_STEP */
    ptrdiff_t window;                      /* 0: none */
    int causal;
    float scale;
};

/* A linear layer in training: its weight is int8 if it has a row_scale, and frozen; A and B may learn. */
struct lk_trained_linear {
    struct lk_linear linear;
    float *da, *db;             /* gradients to A [rank, in] and B [out, rank], or NULL where they are not wanted */
    uint32_t low, high, levels; /* of the dropout of A's input, as for lk_dropout; levels 0: none */
    float keep;                 /* factor of the values that stay */
    int learns;                 /* whether A gets a gradient, so that its input is kept for the backward pass */
    int product;                /* of an int8 weight: LK_PAIRS, LK_VNNI or LK_AMX; LK_BF16 or LK_FP16; else fp32: 0 */
};

/* A decoder layer of the Llama family in training, for samples end to end in a row of n tokens. */
struct lk_training_layer {
    struct lk_trained_linear linears[LK_LINEARS]; /* q, k, v, o, gate, up, down */
    struct lk_norm before, after;
    struct lk_attention attention;
    const float *x, *cosine, *sine;  /* [n, hidden], and [n, head_width] each */
    const int64_t *starts, *lengths; /* [samples] */
    float *packed;                   /* workspace of lk_training_packed bytes */
    double *seconds;                 /* [LK_WORK + 1]: of each kind of work, to which a call adds, and the clock; or NULL */
    ptrdiff_t n, samples;
    int activation, narrow; /* as for lk_gated: its number, and whether gate and up are kept in bf16 */
};

#endif
