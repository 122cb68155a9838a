package kmstest

import "slices"

const tagLimit = 50 // KMS's limit of tags per key

type tagInput struct {
	KeyId   string
	Tags    []tag
	TagKeys []string
}

func checkTags(tags []tag) *apiError {
	if len(tags) > tagLimit {
		return errLimit("A key has at most %d tags.", tagLimit)
	}
	seen := map[string]bool{}
	for _, t := range tags {
		if len(t.Key) < 1 || len(t.Key) > 128 || len(t.Value) > 256 {
			return clientError("TagException", "A tag key has 1 to 128 characters, a tag value at most 256.")
		}
		if seen[t.Key] {
			return clientError("TagException", "Duplicate tag keys")
		}
		seen[t.Key] = true
	}
	return nil
}

func (c *call) taggable(ref, action string) (*key, *apiError) {
	k, aerr := c.key(ref, keyOnly, action, nil)
	if aerr != nil {
		return nil, aerr
	}
	if k.State == statePendingDeletion {
		return nil, badState(k)
	}
	return k, nil
}

func tagResource(c *call, in *tagInput) (*nothing, *apiError) {
	k, aerr := c.taggable(in.KeyId, "TagResource")
	if aerr != nil {
		return nil, aerr
	}
	if aerr := checkTags(in.Tags); aerr != nil {
		return nil, aerr
	}
	tags := k.Tags
	for _, t := range in.Tags {
		if i := slices.IndexFunc(tags, func(have tag) bool { return have.Key == t.Key }); i >= 0 {
			tags[i].Value = t.Value
		} else {
			tags = append(tags, t)
		}
	}
	if aerr := checkTags(tags); aerr != nil {
		return nil, aerr
	}
	k.Tags = tags
	return nil, nil
}

func untagResource(c *call, in *tagInput) (*nothing, *apiError) {
	k, aerr := c.taggable(in.KeyId, "UntagResource")
	if aerr != nil {
		return nil, aerr
	}
	k.Tags = slices.DeleteFunc(k.Tags, func(t tag) bool { return slices.Contains(in.TagKeys, t.Key) })
	return nil, nil
}

type tagsOutput struct {
	Tags       []tag
	NextMarker string `json:",omitempty"`
	Truncated  bool
}

func listResourceTags(c *call, in *listInput) (*tagsOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "ListResourceTags", nil)
	if aerr != nil {
		return nil, aerr
	}
	tags, next, aerr := page(k.Tags, func(t tag) string { return t.Key }, in.Limit, in.Marker, 50)
	if aerr != nil {
		return nil, aerr
	}
	return &tagsOutput{Tags: append([]tag{}, tags...), NextMarker: next, Truncated: next != ""}, nil
}
