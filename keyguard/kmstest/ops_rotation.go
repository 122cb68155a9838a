package kmstest

import (
	"slices"
	"strconv"
	"time"
)

const (
	defaultRotationDays = 365
	onDemandLimit       = 25 // KMS's limit of on-demand rotations in the life of a key
)

type rotationInput struct {
	KeyId                string
	RotationPeriodInDays *int
	Limit                int
	Marker               string
}

// rotatable looks a key up and requires one whose rotation can be changed here.
func (c *call) rotatable(ref, action string) (*key, *family, *apiError) {
	k, aerr := c.key(ref, keyOnly, action, nil)
	if aerr != nil {
		return nil, nil, aerr
	}
	if k.Spec != symmetricDefault || k.Origin != "AWS_KMS" {
		return nil, nil, errUnsupported("%s origin is %s and its spec %s which is not valid for this operation.", k.ARN, k.Origin, k.Spec)
	}
	return k, c.st.Families[k.ID], nil
}

func (c *call) changeRotation(ref, action string) (*key, *family, *apiError) {
	k, f, aerr := c.rotatable(ref, action)
	if aerr != nil {
		return nil, nil, aerr
	}
	if !c.st.primary(k) {
		return nil, nil, errUnsupported("%s is a replica key; rotate its primary key.", k.ARN)
	}
	return k, f, usable(k)
}

func enableKeyRotation(c *call, in *rotationInput) (*nothing, *apiError) {
	_, f, aerr := c.changeRotation(in.KeyId, "EnableKeyRotation")
	if aerr != nil {
		return nil, aerr
	}
	days := defaultRotationDays
	if in.RotationPeriodInDays != nil {
		days = *in.RotationPeriodInDays
	}
	if days < 90 || days > 2560 {
		return nil, errConstraint(strconv.Itoa(days), "rotationPeriodInDays", "Member must have value between 90 and 2560")
	}
	f.Rotation = rotation{Enabled: true, PeriodDays: days, Next: c.now.AddDate(0, 0, days)}
	return nil, nil
}

func disableKeyRotation(c *call, in *rotationInput) (*nothing, *apiError) {
	_, f, aerr := c.changeRotation(in.KeyId, "DisableKeyRotation")
	if aerr != nil {
		return nil, aerr
	}
	f.Rotation = rotation{}
	return nil, nil
}

type rotationStatus struct {
	KeyId                string
	KeyRotationEnabled   bool
	NextRotationDate     *epoch `json:",omitempty"`
	RotationPeriodInDays int    `json:",omitempty"`
}

func getKeyRotationStatus(c *call, in *rotationInput) (*rotationStatus, *apiError) {
	k, f, aerr := c.rotatable(in.KeyId, "GetKeyRotationStatus")
	if aerr != nil {
		return nil, aerr
	}
	out := &rotationStatus{KeyId: k.ARN}
	if f.Rotation.Enabled && k.State != statePendingDeletion {
		out.KeyRotationEnabled, out.RotationPeriodInDays = true, f.Rotation.PeriodDays
		out.NextRotationDate = epochPtr(f.Rotation.Next)
	}
	return out, nil
}

func rotateKeyOnDemand(c *call, in *rotationInput) (*keyIDOutput, *apiError) {
	k, f, aerr := c.changeRotation(in.KeyId, "RotateKeyOnDemand")
	if aerr != nil {
		return nil, aerr
	}
	done := filter(f.Rotations, func(r rotations) bool { return r.Type == onDemand })
	if len(done) >= onDemandLimit {
		return nil, errLimit("The on-demand rotation limit of %d has been reached for %s.", onDemandLimit, k.ARN)
	}
	f.rotate(c.now, onDemand)
	return &keyIDOutput{KeyId: k.ARN}, nil
}

const (
	onDemand  = "ON_DEMAND"
	automatic = "AUTOMATIC"
)

type listedRotation struct {
	KeyId        string
	RotationDate *epoch
	RotationType string
}

type rotationsOutput struct {
	Rotations  []listedRotation
	NextMarker string `json:",omitempty"`
	Truncated  bool
}

func listKeyRotations(c *call, in *rotationInput) (*rotationsOutput, *apiError) {
	k, f, aerr := c.rotatable(in.KeyId, "ListKeyRotations")
	if aerr != nil {
		return nil, aerr
	}
	done := slices.Clone(f.Rotations)
	done, next, aerr := page(done, func(r rotations) string { return r.Date.Format(time.RFC3339Nano) }, in.Limit, in.Marker, 1000)
	if aerr != nil {
		return nil, aerr
	}
	out := &rotationsOutput{Rotations: []listedRotation{}, NextMarker: next, Truncated: next != ""}
	for _, r := range done {
		out.Rotations = append(out.Rotations, listedRotation{KeyId: k.ID, RotationDate: epochPtr(r.Date), RotationType: r.Type})
	}
	return out, nil
}
