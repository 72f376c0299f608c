"""Mathematics over process groups. Knows no model, no request, no Ray and no gRPC."""
