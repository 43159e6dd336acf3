/* The handshake of abi.h: values, sizes and offsets by name, for the check at load in abi.py. */
#include "abi.h"
#include <string.h>

#define VALUE(name) {#name, name}
#define SIZE(type) {#type, sizeof(struct type)}
#define OFFSET(type, field) {#type "." #field, offsetof(struct type, field)}

static const struct {
    const char *name;
    ptrdiff_t value;
} TABLE[] = {
    VALUE(LK_GROUP),
    VALUE(LK_FEEDBACK),
    VALUE(LK_MAX_FUSED_RANK),
    VALUE(LK_MAX_HEAD_WIDTH),
    VALUE(LK_HEAD_STEP),
    VALUE(LK_LINEARS),
    VALUE(LK_PAGE_STEP),
    SIZE(lk_linear),
    OFFSET(lk_linear, weight),
    OFFSET(lk_linear, absmax),
    OFFSET(lk_linear, nested),
    OFFSET(lk_linear, row_scale),
    OFFSET(lk_linear, column_scale),
    OFFSET(lk_linear, outlier_positions),
    OFFSET(lk_linear, outlier_values),
    OFFSET(lk_linear, bias),
    OFFSET(lk_linear, a),
    OFFSET(lk_linear, b),
    OFFSET(lk_linear, output),
    OFFSET(lk_linear, out),
    OFFSET(lk_linear, in),
    OFFSET(lk_linear, rank),
    OFFSET(lk_linear, outliers),
    OFFSET(lk_linear, scaling),
    SIZE(lk_norm),
    OFFSET(lk_norm, weight),
    OFFSET(lk_norm, eps),
    SIZE(lk_layer),
    OFFSET(lk_layer, q),
    OFFSET(lk_layer, k),
    OFFSET(lk_layer, v),
    OFFSET(lk_layer, o),
    OFFSET(lk_layer, gate),
    OFFSET(lk_layer, up),
    OFFSET(lk_layer, down),
    OFFSET(lk_layer, before),
    OFFSET(lk_layer, after),
    OFFSET(lk_layer, of_q),
    OFFSET(lk_layer, of_k),
    OFFSET(lk_layer, heads),
    OFFSET(lk_layer, kv_heads),
    OFFSET(lk_layer, head_width),
    OFFSET(lk_layer, scaling),
    SIZE(lk_update),
    OFFSET(lk_update, codes),
    OFFSET(lk_update, scale),
    OFFSET(lk_update, output),
    OFFSET(lk_update, rank),
    SIZE(lk_paged),
    OFFSET(lk_paged, layers),
    OFFSET(lk_paged, keys),
    OFFSET(lk_paged, values),
    OFFSET(lk_paged, tables),
    OFFSET(lk_paged, starts),
    OFFSET(lk_paged, positions),
    OFFSET(lk_paged, cosine),
    OFFSET(lk_paged, sine),
    OFFSET(lk_paged, updates),
    OFFSET(lk_paged, count),
    OFFSET(lk_paged, pages),
    OFFSET(lk_paged, page_tokens),
    OFFSET(lk_paged, n),
    OFFSET(lk_paged, length),
    OFFSET(lk_paged, rank),
    OFFSET(lk_paged, amx),
    SIZE(lk_heads),
    OFFSET(lk_heads, data),
    OFFSET(lk_heads, token_stride),
    OFFSET(lk_heads, head_stride),
    SIZE(lk_attention),
    OFFSET(lk_attention, heads),
    OFFSET(lk_attention, kv_heads),
    OFFSET(lk_attention, head_width),
    OFFSET(lk_attention, window),
    OFFSET(lk_attention, causal),
    OFFSET(lk_attention, scale),
};

/* The value, size or offset of a name such as LK_GROUP, lk_norm or lk_norm.eps; -1 if the library has no such name. */

ptrdiff_t lk_abi(const char *name)
{
    for (size_t i = 0; i < sizeof TABLE / sizeof TABLE[0]; i++)
        if (strcmp(TABLE[i].name, name) == 0)
            return TABLE[i].value;
    return -1;
}
