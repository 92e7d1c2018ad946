// A norm of rows, or of equal parts of them.

// weight.p and bias.p may be null; either may be one part's, shared by all.
struct Norm {
    In x;
    const float *weight, *bias;
    Out y;
    float eps;
    int width, weight_cols, bias_cols;
};
