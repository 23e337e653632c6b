def image_sentinel_mask(token_ids):
    return token_ids == 60
