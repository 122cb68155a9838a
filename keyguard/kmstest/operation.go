package kmstest

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// operation is one row of the table of KMS operations.
type operation struct {
	changes bool // runs on a copy of the state that is saved if it succeeds
	run     func(c *call, body []byte) (any, *apiError)
}

// reading and changing wrap a typed handler. A handler that returns a nil *Out
// answers with an empty body, as KMS does.
func reading[In, Out any](f func(*call, *In) (*Out, *apiError)) operation {
	return operation{run: decoding(f)}
}

func changing[In, Out any](f func(*call, *In) (*Out, *apiError)) operation {
	return operation{changes: true, run: decoding(f)}
}

// nothing is the output of operations that answer with an empty body.
type nothing struct{}

func decoding[In, Out any](f func(*call, *In) (*Out, *apiError)) func(*call, []byte) (any, *apiError) {
	return func(c *call, body []byte) (any, *apiError) {
		in := new(In)
		if len(bytes.TrimSpace(body)) > 0 {
			if err := json.Unmarshal(body, in); err != nil {
				return nil, clientError("SerializationException", "%s", err)
			}
		}
		out, aerr := f(c, in)
		if aerr != nil || out == nil {
			return nil, aerr
		}
		return out, nil
	}
}

// operations is the table. What is absent answers UnknownOperationException.
func operations() map[string]operation {
	return map[string]operation{
		"CreateKey":            changing(createKey),
		"DescribeKey":          reading(describeKey),
		"ListKeys":             reading(listKeys),
		"EnableKey":            changing(enableKey),
		"DisableKey":           changing(disableKey),
		"ScheduleKeyDeletion":  changing(scheduleKeyDeletion),
		"CancelKeyDeletion":    changing(cancelKeyDeletion),
		"UpdateKeyDescription": changing(updateKeyDescription),
		"ReplicateKey":         changing(replicateKey),

		"CreateAlias": changing(createAlias),
		"UpdateAlias": changing(updateAlias),
		"DeleteAlias": changing(deleteAlias),
		"ListAliases": reading(listAliases),

		"Encrypt":                         reading(encrypt),
		"Decrypt":                         reading(decrypt),
		"ReEncrypt":                       reading(reEncrypt),
		"GenerateDataKey":                 reading(generateDataKey),
		"GenerateDataKeyWithoutPlaintext": reading(generateDataKeyWithoutPlaintext),
		"GenerateRandom":                  reading(generateRandom),

		"PutKeyPolicy":    changing(putKeyPolicy),
		"GetKeyPolicy":    reading(getKeyPolicy),
		"ListKeyPolicies": reading(listKeyPolicies),

		"EnableKeyRotation":    changing(enableKeyRotation),
		"DisableKeyRotation":   changing(disableKeyRotation),
		"GetKeyRotationStatus": reading(getKeyRotationStatus),
		"RotateKeyOnDemand":    changing(rotateKeyOnDemand),
		"ListKeyRotations":     reading(listKeyRotations),

		"CreateGrant": changing(createGrant),
		"ListGrants":  reading(listGrants),
		"RevokeGrant": changing(revokeGrant),
		"RetireGrant": changing(retireGrant),

		"TagResource":      changing(tagResource),
		"UntagResource":    changing(untagResource),
		"ListResourceTags": reading(listResourceTags),
	}
}

// epoch is a time as AWS JSON writes it: seconds since 1970 with milliseconds.
type epoch time.Time

func (e epoch) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, float64(time.Time(e).UnixMilli())/1000, 'f', 3, 64), nil
}

func epochPtr(t time.Time) *epoch {
	if t.IsZero() {
		return nil
	}
	e := epoch(t)
	return &e
}

// page cuts one page out of a sorted list. The marker is the identity of the
// last item of the page before.
func page[T any](items []T, id func(T) string, limit int, marker string, most int) (out []T, next string, aerr *apiError) {
	if limit == 0 {
		limit = min(100, most)
	}
	if limit < 0 || limit > most {
		return nil, "", errConstraint(strconv.Itoa(limit), "limit", "Member must have value less than or equal to "+strconv.Itoa(most))
	}
	if marker != "" {
		found := false
		for i, item := range items {
			if id(item) == marker {
				items, found = items[i+1:], true
				break
			}
		}
		if !found {
			return nil, "", clientError("InvalidMarkerException", "Invalid marker")
		}
	}
	if len(items) <= limit {
		return items, "", nil
	}
	return items[:limit], id(items[limit-1]), nil
}
