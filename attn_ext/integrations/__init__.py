"""attn_ext as the attention of other libraries, each imported when its integration is used, not before."""
