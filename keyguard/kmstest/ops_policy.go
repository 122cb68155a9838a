package kmstest

type policyInput struct {
	KeyId                          string
	PolicyName                     string
	Policy                         string
	BypassPolicyLockoutSafetyCheck bool
}

const policyName = "default"

func checkPolicyName(name string) *apiError {
	if name != "" && name != policyName {
		return errNotFound("No such policy exists: %.100s", name)
	}
	return nil
}

func putKeyPolicy(c *call, in *policyInput) (*nothing, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "PutKeyPolicy", nil)
	if aerr != nil {
		return nil, aerr
	}
	if aerr := checkPolicyName(in.PolicyName); aerr != nil {
		return nil, aerr
	}
	if aerr := c.checkPolicy(in.Policy, in.BypassPolicyLockoutSafetyCheck); aerr != nil {
		return nil, aerr
	}
	k.Policy = in.Policy
	return nil, nil
}

type policyOutput struct{ Policy, PolicyName string }

func getKeyPolicy(c *call, in *policyInput) (*policyOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "GetKeyPolicy", nil)
	if aerr != nil {
		return nil, aerr
	}
	if aerr := checkPolicyName(in.PolicyName); aerr != nil {
		return nil, aerr
	}
	return &policyOutput{Policy: k.Policy, PolicyName: policyName}, nil
}

type policiesOutput struct {
	PolicyNames []string
	Truncated   bool
}

func listKeyPolicies(c *call, in *listInput) (*policiesOutput, *apiError) {
	if _, aerr := c.key(in.KeyId, keyOnly, "ListKeyPolicies", nil); aerr != nil {
		return nil, aerr
	}
	return &policiesOutput{PolicyNames: []string{policyName}}, nil
}
